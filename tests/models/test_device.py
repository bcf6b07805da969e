"""Unpacking quantised layers: the numbers of the packed product, for every kind of layer."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.afm7 import FusedLinear
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_dpo.errors import ModelError
from mlx_dpo.models.device import dequantize_layer, device_kind, prepare_for_cpu

MODES = [("affine", 64, 2), ("affine", 32, 3), ("affine", 64, 4), ("affine", 128, 6)]
MODES += [("affine", 64, 8), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]

pytestmark = pytest.mark.skipif(device_kind() != "cpu", reason="what the CPU backend wants")


def close(got: mx.array, expected: mx.array) -> bool:
    """Equal but for the order of float32 sums."""
    return bool(mx.abs(got - expected).max() <= 1e-6 * mx.abs(expected).max())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_an_unpacked_layer_multiplies_as_the_packed_one_does_in_float32(
    mode, group_size, bits, dtype
):
    """Scales of 16 bits included: unpacked in 16 bits, the weights would be rounded again."""
    mx.random.seed(0)
    linear = nn.Linear(128, 48)
    linear.weight, linear.bias = linear.weight.astype(dtype), mx.random.normal((48,)).astype(dtype)
    packed = linear.to_quantized(group_size, bits, mode)
    x = mx.random.normal((3, 128))
    wide = {n: p.astype(mx.float32) for n, p in packed.items() if n in ("scales", "biases")}
    wide = wide if mode == "affine" else {"scales": packed.scales, "biases": None}
    expected = mx.quantized_matmul(
        x,
        packed.weight,
        wide["scales"],
        wide["biases"],
        group_size=group_size,
        bits=bits,
        mode=mode,
    )
    plain = dequantize_layer(packed)
    assert type(plain) is nn.Linear and plain.weight.dtype == plain.bias.dtype == mx.float32
    assert close(plain(x), expected + linear.bias.astype(mx.float32))


@pytest.mark.parametrize("bias", [True, False])
def test_experts_are_unpacked_with_their_biases(bias):
    mx.random.seed(1)
    experts = SwitchLinear(64, 32, 4, bias=bias)
    if bias:
        experts.bias = mx.random.normal((4, 32))
    packed = experts.to_quantized(32, 4)
    x, chosen = mx.random.normal((5, 1, 1, 64)), mx.array([[0, 2], [1, 3], [3, 0], [2, 2], [1, 0]])
    plain = dequantize_layer(packed)
    assert type(plain) is SwitchLinear and ("bias" in plain) == bias
    assert close(plain(x, chosen), packed(x, chosen))


@pytest.mark.parametrize("transpose", [True, False])
def test_a_matrix_for_each_head_is_unpacked(transpose):
    mx.random.seed(2)
    packed = MultiLinear(64, 32, 4).to_quantized(32, 4)
    x = mx.random.normal((2, 4, 3, 64 if transpose else 32))
    assert close(dequantize_layer(packed)(x, transpose=transpose), packed(x, transpose=transpose))


def test_a_fused_projection_is_still_split():
    mx.random.seed(3)
    packed = FusedLinear(64, [32, 16, 16]).to_quantized(32, 4)
    x = mx.random.normal((3, 64))
    parts, expected = dequantize_layer(packed)(x), packed(x)
    assert [part.shape for part in parts] == [(3, 32), (3, 16), (3, 16)]
    assert all(close(part, other) for part, other in zip(parts, expected, strict=True))


def test_a_tied_embedding_is_unpacked_for_both_its_uses():
    mx.random.seed(4)
    packed = nn.Embedding(50, 64).to_quantized(32, 4)
    plain, ids, x = dequantize_layer(packed), mx.array([0, 7, 49]), mx.random.normal((3, 64))
    assert mx.array_equal(plain(ids), packed(ids))
    assert close(plain.as_linear(x), packed.as_linear(x))


def test_a_global_scale_is_refused_because_only_a_gpu_reads_it():
    packed = SwitchLinear(64, 32, 2, bias=False).to_quantized(16, 4, "nvfp4")
    packed.global_scale = mx.ones((2,))
    with pytest.raises(ModelError, match=r"experts: quantized as nvfp4 with a global scale"):
        dequantize_layer(packed, name="experts")


class Unusual(nn.QuantizedLinear):
    """Adds one to a product: a subclass is not known to compute what its parent does."""

    def __call__(self, x):
        return super().__call__(x) + 1


def test_every_layer_of_a_model_is_replaced_and_an_unusual_one_is_left_and_counted():
    model = nn.Sequential(
        nn.Linear(64, 64).to_quantized(64, 4),
        nn.Linear(64, 64).to_quantized(64, 8),
        nn.LayerNorm(64),
        Unusual(64, 64, group_size=64, bits=4),
    )
    model.layers[2].set_dtype(mx.bfloat16)
    x = mx.random.normal((2, 64))
    expected = model(x)
    notes = prepare_for_cpu(model)
    assert close(model(x), expected)
    assert [type(layer) for layer in model.layers] == [
        nn.Linear,
        nn.Linear,
        nn.LayerNorm,
        Unusual,
    ]
    assert notes[0].startswith("4 and 8-bit weights dequantized to float32")
    assert notes[1].startswith("1 layer left quantized")
    assert notes[2] == "bfloat16 weights converted to float32 (faster on the CPU backend)"
    floats = [v for _, v in tree_flatten(model.parameters()) if v.dtype != mx.uint32]
    assert {v.dtype for v in floats} == {mx.float32}


def test_unpacking_never_holds_a_second_model():
    """16 layers of 1 MB packed in 4 bits (0.14 MB): the peak stays near the unpacked sum."""
    layers = [nn.Linear(512, 512, bias=False).to_quantized(64, 4) for _ in range(16)]
    model = nn.Sequential(*layers)
    del layers
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    prepare_for_cpu(model)
    added = mx.get_peak_memory() - before
    unpacked, packed = 16 * 512 * 512 * 4, 16 * 512 * 512 * (4 + 1) / 8
    assert added < unpacked - packed + 2 * 512 * 512 * 4
