"""Models and pairs that many tests share: small enough to check by hand."""

import os
import shutil
from pathlib import Path

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import pytest
from mlx_lm.models import llama

from mlx_dpo.paths import cache_folder
from mlx_dpo.startup.jit_cache import use_private_jit_cache
from mlx_dpo.training.monitor import samples
from mlx_dpo.types import TokenizedPair
from tests.run_settings import SAMPLE_TOKENS
from tests.trained_run import trained, workplace  # noqa: F401  (fixtures)

VOCAB = 64

# Tests that train whole runs, start processes or draw pictures: `scripts/test --fast` leaves them
# out, which is the quicker half of all tests in a tenth of the time.
INTEGRATION = {
    *("cli", "demo", "doctor", "examples", "export", "fuzz", "hub"),
    *("runs", "saved_runs", "scripts"),
    "chat/test_session.py",
    "collect/test_web.py",
    "data/test_fuzz.py",
    "data/inspect/test_scan.py",
    "data/test_load_pairs.py",
    "data/tokenization/test_parallel.py",
    "data/test_real_files.py",
    "data/tokenization/test_token_cache.py",
    "evaluation/drift/test_drift_report.py",
    *(
        f"evaluation/measurements/test_{name}.py"
        for name in ("perplexity", "reference_answers", "tasks")
    ),
    "profiling/test_device_memory.py",
    "profiling/test_memory.py",
    "profiling/test_profile.py",
    "reporting/test_plots.py",
    "reporting/test_run_page.py",
    "reporting/test_run_page_in_browser.py",
    "scoring/kernels/test_gradient_checkpointing.py",
    "scoring/test_lm_head.py",
    "scoring/test_scorers.py",
    "test_readme.py",
    "trackers/test_trackers.py",
    "training/test_trl_agreement.py",
    "training/test_trl_kto_agreement.py",
    "training/test_trl_loss_runs.py",
    "training/test_trl_sft_agreement.py",
    "config/test_settings_have_effect.py",
}


TESTS = Path(__file__).parent


def is_integration(path):
    file = path.relative_to(TESTS)
    return bool({file.as_posix(), file.parts[0]} & INTEGRATION)


def pytest_collection_modifyitems(items):
    for item in items:
        if is_integration(item.path):
            item.add_marker(pytest.mark.integration)


def pytest_ignore_collect(collection_path, config):
    """Importing what is left out would take as long as some of the tests."""
    if "not integration" in config.option.markexpr and collection_path.is_relative_to(TESTS):
        return is_integration(collection_path) or None
    return None


def link_or_copy(source, target):
    """Make a hard link; copy the file if the temporary folder is on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    kernels = use_private_jit_cache(cache_folder())  # compiled for this machine already
    if kernels is not None:
        shutil.copytree(kernels, folder / kernels.name, copy_function=link_or_copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_DPO_CACHE", str(folder))
        patch.setenv("MLX_DPO_STATUS", "0")  # tests of messages want messages only
        patch.setattr(samples, "SAMPLE_TOKENS", SAMPLE_TOKENS)
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
