import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.profiling.memory import (
    base_parameters,
    parameter_bytes,
    resident_bytes,
    step_peak_bytes,
    step_peak_upper_bound,
    total_parameters,
    trainable_parameters,
)
from mlx_dpo.scoring.scorers import memory_efficient_training, plain_scorer
from mlx_dpo.types import TokenizedPair
from tests.conftest import make_llama
from tests.scoring.small_models import make

VOCAB = 2048
PAIRS = [TokenizedPair(tuple(range(1, 301)), tuple(range(1, 81)), tuple(range(9, 69)))] * 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_weights_count_as_the_weights_they_encode(bits):
    plain, packed = make_llama(), make_llama()
    nn.quantize(packed, group_size=64, bits=bits)
    assert total_parameters(packed) == total_parameters(plain)


def test_trainable_parameters_follow_from_the_rank():
    model = make_llama()
    adapters.attach_adapters(model, rank=4, scale=1.0, target_modules=["q_proj"])
    assert trainable_parameters(model) == 2 * 4 * (64 + 64)


def test_base_parameters_exclude_adapters_but_not_trained_weights():
    count = total_parameters(make_llama())
    adapted, full = make_llama(), make_llama()
    adapters.attach_adapters(adapted, rank=4, scale=1.0, kind="dora")
    adapters.enable_full_fine_tuning(full, num_layers=1)
    assert base_parameters(adapted) == base_parameters(full) == count
    assert resident_bytes(full, 0) == parameter_bytes(make_llama())


def peak_of_step(policy, recompute):
    """What MLX counts for two whole rows of each pair, all logits kept, and their gradients."""

    def total(model):
        logps = plain_scorer(model, PAIRS)
        return (logps.chosen - logps.rejected).sum()

    mx.clear_cache()
    mx.reset_peak_memory()
    with memory_efficient_training(policy, recompute=recompute):
        mx.eval(nn.value_and_grad(policy, total)(policy))
    return mx.get_peak_memory()


@pytest.mark.parametrize("target_modules", [(), ("q_proj",)])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_upper_bound_is_not_exceeded(recompute, target_modules):
    config = {
        "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 6,
        "intermediate_size": 384, "num_attention_heads": 4, "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
    }  # fmt: skip
    policy = llama.Model(llama.ModelArgs.from_dict(config))
    adapters.attach_adapters(policy, rank=8, scale=1.0, target_modules=target_modules)
    mx.eval(policy.parameters())
    bound = step_peak_upper_bound(policy, config, PAIRS, vocab_size=VOCAB, optimizer_bytes=0)
    assert bound is not None
    assert peak_of_step(policy, recompute) < bound


def test_recurrent_models_have_no_upper_bound():
    for kind, is_known in (("llama", True), ("mamba", False), ("qwen3_next", False)):
        bound = step_peak_upper_bound(
            make(kind), {"num_attention_heads": 4}, PAIRS, vocab_size=48, optimizer_bytes=0
        )
        assert (bound is not None) is is_known


def test_resident_and_peak_memory_by_hand():
    model = make_llama()
    adapters.attach_adapters(model, rank=4, scale=1.0, target_modules=["q_proj"])
    trained = 2 * 4 * (64 + 64) * 4  # bytes
    weights = parameter_bytes(make_llama())
    held = weights + trained + 1000  # that the optimizer remembers
    assert resident_bytes(model, 1000) == held
    assert step_peak_bytes(model, 10**9, 1000) == held + 10**9
    # A pass of nothing: the update holds copies of what is trained.
    assert step_peak_bytes(model, 0, 1000) == held + 5 * trained
