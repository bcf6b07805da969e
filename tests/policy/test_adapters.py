import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.policy import adapters
from tests.conftest import make_llama

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])
ALL = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
]  # fmt: skip


def attach(model, **more):
    return adapters.attach(model, **({"rank": 4, "scale": 2.0, "seed": 1} | more))


def randomise(model, seed=7):
    """Give B values as training would, so that the adapters do something."""
    mx.random.seed(seed)
    for module in adapters.adapted_modules(model).values():
        module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)


def description(keys=ALL, num_layers=2):
    return adapters.adapter_config(keys=keys, rank=4, scale=2.0, dropout=0.0, num_layers=num_layers)


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
    layer = adapters.LoRALinear(3, 2, r=1, scale=2.0)
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
    layer = adapters.LoRALinear(2, 1, r=1, scale=1.0)
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
    assert sorted(adapters.adapted_modules(tiny_llama)) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip


def test_a_target_that_matches_nothing_is_refused_with_what_there_is(tiny_llama):
    with pytest.raises(ConfigError, match=r"`proj` matches no linear layer.*self_attn\.q_proj"):
        attach(tiny_llama, target_modules=["q_proj", "proj"])


def test_only_the_last_layers(tiny_llama):
    attach(tiny_llama, num_layers=1, target_modules=["q_proj"])
    assert list(adapters.adapted_modules(tiny_llama)) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(ConfigError, match="`num_layers` is 3, but the model has 2"):
        attach(make_llama(), num_layers=3)


def test_adapters_are_not_stacked(tiny_llama):
    attach(tiny_llama)
    with pytest.raises(ModelError, match="adapters already"):
        attach(tiny_llama)


def test_switched_off_is_the_base_bit_for_bit_and_back_again(tiny_llama):
    base = tiny_llama(TOKENS)
    attach(tiny_llama)
    randomise(tiny_llama)
    adapted = tiny_llama(TOKENS)
    assert not mx.allclose(adapted, base, atol=1e-2)
    for _ in range(3):
        with adapters.adapters_off(tiny_llama):
            assert mx.array_equal(tiny_llama(TOKENS), base)
        assert mx.array_equal(tiny_llama(TOKENS), adapted)


@pytest.mark.parametrize("bits", [None, 4])
def test_saved_adapters_load_here_and_in_mlx_lm(tiny_llama, tmp_path, bits):
    def base():
        model = make_llama()
        if bits:
            nn.quantize(model, group_size=64, bits=bits)
        return model

    policy = base()
    keys = attach(policy, target_modules=["q_proj", "down_proj"], num_layers=1)
    randomise(policy)
    adapters.save_adapter(tmp_path, policy, description(keys, num_layers=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json", "adapters.safetensors",
    ]  # fmt: skip
    expected = policy(TOKENS)

    ours = base()
    adapters.load_adapter(ours, tmp_path)
    assert mx.array_equal(ours(TOKENS), expected)
    assert not tree_flatten(ours.trainable_parameters())

    theirs = load_adapters(base(), str(tmp_path))
    assert mx.allclose(theirs(TOKENS), expected, atol=1e-5)


def test_adapters_of_another_model_are_refused_by_name(tiny_llama, tmp_path):
    attach(tiny_llama, target_modules=["q_proj"])
    adapters.save_adapter(tmp_path, tiny_llama, description(["self_attn.q_proj"]))
    wrong = json.loads((tmp_path / "adapter_config.json").read_text())
    wrong["lora_parameters"]["rank"] = 5
    (tmp_path / "adapter_config.json").write_text(json.dumps(wrong))
    with pytest.raises(ModelError, match=r"another model.*layers\.0\.self_attn\.q_proj\.lora_a"):
        adapters.load_adapter(make_llama(), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no `adapter_config.json`"),
        ("{", "not an adapter description"),
        ("[]", "not an adapter description"),
        ('{"num_layers": 2, "lora_parameters": {"rank": 4, "dropout": 0}}', "missing `scale`"),
        ('{"lora_parameters": {"rank": 4, "scale": 1, "dropout": 0}}', "missing `num_layers`"),
        (
            '{"fine_tune_type": "dora", "num_layers": 2,'
            ' "lora_parameters": {"rank": 4, "scale": 1, "dropout": 0}}',
            "fine_tune_type `dora`",
        ),
    ],
)
def test_a_folder_without_adapters_says_what_is_wrong(tiny_llama, tmp_path, content, message):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        adapters.load_adapter(tiny_llama, tmp_path)


def test_damaged_weights_are_one_line(tiny_llama, tmp_path):
    attach(tiny_llama)
    adapters.save_adapter(tmp_path, tiny_llama, description())
    (tmp_path / "adapters.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot be read") as error:
        adapters.load_adapter(make_llama(), tmp_path)
    assert "\n" not in str(error.value)
