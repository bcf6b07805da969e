import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.layers.distributed import shard_linear

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.layers import LoRALinear
from mlx_dpo.errors import ConfigError, ModelError
from tests.conftest import make_llama

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])
ALL = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
]  # fmt: skip


def attach(model, **more):
    return adapters.attach_adapters(model, **({"rank": 4, "scale": 2.0, "seed": 1} | more))


def randomise(model, seed=7):
    """Give B values as training would, so that the adapters do something."""
    mx.random.seed(seed)
    for module in adapters.adapted_layers(model).values():
        module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)


def test_fresh_adapters_change_nothing_bit_for_bit(tiny_llama):
    before = tiny_llama(TOKENS)
    attach(tiny_llama)
    assert mx.array_equal(tiny_llama(TOKENS), before)


def test_only_adapters_are_trained_and_all_linear_layers_have_them(tiny_llama):
    keys = attach(tiny_llama)
    assert sorted(keys) == sorted(ALL)
    trained = adapters.adapter_weights(tiny_llama)
    names = {f"model.layers.{i}.{key}.{x}" for i in (0, 1) for key in ALL for x in
             ("lora_a", "lora_b")}  # fmt: skip
    assert trained.keys() == names
    # rank * (in + out), by hand: 4 square maps of 64, three between 64 and 128
    assert sum(v.size for v in trained.values()) == 2 * 4 * (4 * 128 + 3 * 192)


def test_the_adapted_layer_is_the_base_plus_the_scaled_product():
    linear = nn.Linear(3, 2, bias=False)
    linear.weight = mx.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    layer = LoRALinear(3, 2, r=1, scale=2.0)
    layer.linear = linear
    layer.lora_a = mx.array([[1.0], [1.0], [1.0]])
    layer.lora_b = mx.array([[10.0, 100.0]])
    # x W^T = (1, 2); x A = 6; scale * 6 * B = (120, 1200)
    assert layer(mx.array([[1.0, 2.0, 3.0]])).tolist() == [[121.0, 1202.0]]


def test_a_bfloat16_base_keeps_bfloat16_activations_and_float32_adapters(tiny_llama):
    tiny_llama.set_dtype(mx.bfloat16)
    attach(tiny_llama)
    randomise(tiny_llama)
    assert tiny_llama(TOKENS).dtype == mx.bfloat16
    assert {v.dtype for v in adapters.adapter_weights(tiny_llama).values()} == {mx.float32}


def test_products_are_taken_in_the_type_of_the_activations():
    """1 + 2^-9 is 1 in bfloat16, so the product is 0; in float32 it would be 2^-9."""
    layer = LoRALinear(2, 1, r=1, scale=1.0)
    layer.linear.weight = mx.zeros((1, 2), mx.bfloat16)
    layer.lora_a, layer.lora_b = mx.array([[1 + 2**-9], [1.0]]), mx.array([[1.0]])
    assert layer(mx.array([[1.0, -1.0]], dtype=mx.bfloat16)).item() == 0.0
    assert layer(mx.array([[1.0, -1.0]], dtype=mx.float32)).item() == 2**-9


def test_the_seed_decides_the_start(tiny_llama):
    attach(tiny_llama, seed=3)
    first = adapters.adapter_weights(tiny_llama)
    again, other = make_llama(), make_llama()
    attach(again, seed=3)
    attach(other, seed=4)
    name = "model.layers.0.self_attn.q_proj.lora_a"
    assert mx.array_equal(first[name], adapters.adapter_weights(again)[name])
    assert not mx.array_equal(first[name], adapters.adapter_weights(other)[name])
    assert np.abs(np.array(first[name])).max() <= 1 / 8  # uniform within 1/sqrt(64)


@pytest.mark.parametrize("target", ["q_proj", "self_attn.q_proj"])
def test_a_target_is_a_path_or_its_last_part(tiny_llama, target):
    assert attach(tiny_llama, target_modules=[target]) == ["self_attn.q_proj"]
    assert sorted(adapters.adapted_layers(tiny_llama)) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip


def test_the_error_of_a_target_without_a_match_lists_the_layers(tiny_llama):
    with pytest.raises(ConfigError, match=r"`proj` matches no trainable module.*self_attn\.q_proj"):
        attach(tiny_llama, target_modules=["q_proj", "proj"])


def test_only_the_last_layers(tiny_llama):
    attach(tiny_llama, num_layers=1, target_modules=["q_proj"])
    assert list(adapters.adapted_layers(tiny_llama)) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(ConfigError, match="`num_layers` is 3, but the model has 2"):
        attach(make_llama(), num_layers=3)


def test_adapters_are_not_stacked(tiny_llama):
    attach(tiny_llama)
    with pytest.raises(ModelError, match="already has adapters"):
        attach(tiny_llama)


def test_switched_off_is_the_base_bit_for_bit_and_back_again(tiny_llama):
    base = tiny_llama(TOKENS)
    attach(tiny_llama)
    randomise(tiny_llama)
    adapted = tiny_llama(TOKENS)
    assert not mx.allclose(adapted, base, atol=1e-2)
    for _ in range(3):
        with adapters.disable_adapters(tiny_llama):
            assert mx.array_equal(tiny_llama(TOKENS), base)
        assert mx.array_equal(tiny_llama(TOKENS), adapted)


def test_off_is_refused_where_the_base_itself_was_trained(tiny_llama):
    adapters.enable_full_fine_tuning(tiny_llama)
    with (
        pytest.raises(RuntimeError, match="no adapter to disable"),
        adapters.disable_adapters(tiny_llama),
    ):
        pass


def test_adapters_are_refused_on_tensor_parallel_layers(tiny_llama):
    """mlx-lm's LoRA on them computes a wrong loss and wrong gradients, without an error."""
    mlp = tiny_llama.layers[1].mlp
    mlp.up_proj = shard_linear(mlp.up_proj, "all-to-sharded")
    with pytest.raises(ModelError, match=r"`model.layers.1.mlp.up_proj` is divided among"):
        attach(tiny_llama)
