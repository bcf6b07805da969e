"""Models and pairs that many tests share: small enough to check by hand."""

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import pytest
from mlx_lm.models import llama

from mlx_dpo.types import TokenizedPair
from tests.trained_run import trained, workplace  # noqa: F401  (fixtures)

VOCAB = 64


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Uniform:
    """Every token costs exactly log(VOCAB), so that a log-probability is a token count."""

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.zeros((*tokens.shape, VOCAB))


@pytest.fixture
def uniform():
    return Uniform()


def make_llama(seed: int = 0) -> llama.Model:
    mx.random.seed(seed)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=128,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=VOCAB,
        )
    )


@pytest.fixture
def tiny_llama():
    return make_llama()


@pytest.fixture
def pairs():
    return [
        TokenizedPair(prompt=(1, 2, 3), chosen=(10, 11), rejected=(20,), location="a:1"),
        TokenizedPair(prompt=(4,), chosen=(12, 13, 14, 15), rejected=(21, 22), location="a:2"),
        TokenizedPair(prompt=(5, 6), chosen=(16,), rejected=(23, 24, 25), location="a:3"),
        TokenizedPair(prompt=(7, 8, 9, 2), chosen=(17, 18), rejected=(26, 27), location="a:4"),
        TokenizedPair(prompt=(3,), chosen=(19, 30, 31), rejected=(28,), location="a:5"),
    ]
