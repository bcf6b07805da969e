import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama

from mlx_dpo.policy import adapters
from mlx_dpo.policy.memory import estimate_peak, total_parameters, trainable_parameters
from mlx_dpo.policy.scorers import make_shared, plain_scorer
from mlx_dpo.policy.sparing import sparing_memory
from mlx_dpo.types import TokenizedPair
from tests.conftest import make_llama

VOCAB = 2048
PAIRS = [TokenizedPair(tuple(range(1, 301)), tuple(range(1, 81)), tuple(range(9, 69)))] * 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_weights_are_counted_as_what_they_stand_for(bits):
    plain, packed = make_llama(), make_llama()
    nn.quantize(packed, group_size=64, bits=bits)
    assert total_parameters(packed) == total_parameters(plain)


def test_what_is_trained_is_counted_by_rank():
    model = make_llama()
    adapters.attach(model, rank=4, scale=1.0, target_modules=["q_proj"])
    assert trainable_parameters(model) == 2 * 4 * (64 + 64)


@pytest.fixture(scope="module")
def policy():
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=128, num_hidden_layers=6, intermediate_size=384,
            num_attention_heads=4, rms_norm_eps=1e-5, vocab_size=VOCAB,
        )
    )  # fmt: skip
    mx.eval(model.parameters())
    adapters.attach(model, rank=8, scale=1.0)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_estimate_is_near_what_mlx_counts(policy, shared, recompute):
    scorer = plain_scorer
    if shared:
        scorer = make_shared(vocab_size=VOCAB, gradients=True, pairs_together=False)

    def total(model):
        logps = scorer(model, PAIRS)
        return (logps.chosen - logps.rejected).sum()

    estimate = estimate_peak(policy, PAIRS, vocab_size=VOCAB, shared=shared, recompute=recompute)
    mx.clear_cache()
    mx.reset_peak_memory()
    with sparing_memory(policy, recompute=recompute):
        mx.eval(nn.value_and_grad(policy, total)(policy))
    assert mx.get_peak_memory() == pytest.approx(estimate, rel=0.5)
