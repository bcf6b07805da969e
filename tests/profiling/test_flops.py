"""Operations counted by hand, and against products of matrices that were really made."""

from dataclasses import replace

import mlx.nn as nn
import pytest
from mlx_lm.models import llama

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.attach import attach_adapters, enable_full_fine_tuning
from mlx_dpo.profiling.flops import ModelFlops, TokenCounts, count_attended_keys, model_flops
from mlx_dpo.types import TokenizedPair
from tests.conftest import make_llama
from tests.scoring.small_models import make

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3, "intermediate_size": 12,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 10,
}  # fmt: skip
PAIR = TokenizedPair((1, 2, 3, 4), (5, 6, 7), (8,))
# Two heads of 4 and one of keys: 8x8 + 2 of 8x4 + 8x8, and three matrices of 8x12.
BLOCK = 64 + 32 + 32 + 64 + 3 * 96
ADAPTERS = 2 * (16 + 12 + 12 + 16 + 3 * 20)  # of rank 2: inputs and outputs of each


def adapted(num_layers=None):
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    attach_adapters(model, rank=2, scale=1.0, num_layers=num_layers)
    return model_flops(model, CONFIG, vocab_size=10)


def test_flops_of_layers_and_head():
    assert adapted() == ModelFlops(
        linear=3 * BLOCK,
        linear_backward=3 * BLOCK,
        adapters=3 * ADAPTERS,
        attention=3 * 8,
        attention_backward=3 * 8,
        head=80,
    )


def test_gradients_stop_at_the_first_trained_layer():
    work = adapted(num_layers=1)
    assert (work.linear, work.linear_backward) == (3 * BLOCK, BLOCK)
    assert (work.attention, work.attention_backward) == (24, 8)
    assert work.adapters == ADAPTERS


def test_fully_trained_weights_are_not_adapters():
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    enable_full_fine_tuning(model, num_layers=1, target_modules=["mlp", "input_layernorm"])
    work = model_flops(model, CONFIG, vocab_size=10)
    assert (work.adapters, work.trained_linear, work.linear_backward) == (0, 3 * 96, BLOCK)
    tokens = TokenCounts(layer_tokens=7, head_tokens=4, attended_keys=25)
    frozen = replace(work, trained_linear=0)
    assert work.forward(tokens) == frozen.forward(tokens)
    more = work.training(tokens, recompute=False) - frozen.training(tokens, recompute=False)
    assert more == 2 * 3 * 96 * 7


def test_only_adapters_of_used_experts_count():
    model = make("mixtral")
    adapters.detach_adapters(model)
    attach_adapters(model, rank=2, scale=1.0, target_modules=["switch_mlp.up_proj"])
    work = model_flops(model, {"num_experts_per_tok": 2, "hidden_size": 32}, vocab_size=48)
    assert work.adapters == 3 * 2 * 2 * (32 + 48)  # blocks, experts, rank


def test_operations_of_a_pass_by_hand():
    work = ModelFlops(
        linear=100, linear_backward=50, adapters=10, attention=8, attention_backward=4, head=30
    )
    tokens = TokenCounts(layer_tokens=7, head_tokens=4, attended_keys=25)
    forward = 2 * (100 + 10) * 7 + 4 * 8 * 25 + 2 * 30 * 4
    assert work.forward(tokens) == forward == 2580
    assert work.forward(tokens, adapted=False) == forward - 2 * 10 * 7
    backward = 2 * 50 * 7 + 4 * 10 * 7 + 10 * 4 * 25 + 2 * 30 * 4
    assert work.training(tokens, recompute=False) == forward + backward
    again = 2 * (50 + 10) * 7 + 4 * 4 * 25
    assert work.training(tokens, recompute=True) == forward + backward + again


def test_every_token_attends_to_itself_and_all_previous_ones():
    # Rows of 6 and 4 tokens, but for the last of each: 21 and 10 keys; 10 of them twice.
    assert count_attended_keys([PAIR], shared=False) == 21 + 10
    assert count_attended_keys([PAIR], shared=True) == 21
    assert count_attended_keys([PAIR, PAIR], shared=True) == 42


def test_only_used_experts_count():
    model = make("mixtral")
    met = model_flops(model, {"num_experts_per_tok": 2, "hidden_size": 32}, vocab_size=48).linear
    every = model_flops(model, {"hidden_size": 32}, vocab_size=48).linear
    experts = 3 * 3 * 32 * 48  # in three blocks: three matrices of each expert
    assert every - met == 2 * experts


def test_a_recurrent_layer_has_no_attention():
    model = make("qwen3_next")
    work = model_flops(model, {"num_attention_heads": 4, "head_dim": 8}, vocab_size=48)
    assert work.attention == 32  # one block of three


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantized_weights_count_as_the_weights_they_encode(bits):
    plain, packed = make_llama(), make_llama()
    nn.quantize(packed, group_size=64, bits=bits)
    counts = [model_flops(m, {"hidden_size": 64}, vocab_size=64).linear for m in (plain, packed)]
    assert counts[0] == counts[1] == 2 * (4 * 64 * 64 + 3 * 64 * 128)
