"""Layers with adapters, against float64 and against each other."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_dpo.adapters.layers import adapter_dropout, adapter_rank, add_adapter, base_layer
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.device import float32_weight

IN, OUT, RANK, SCALE = 256, 24, 3, 1.7
PACKINGS = [
    None,
    *[("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)],
    ("affine", 4, 32), ("affine", 3, 128), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32),
]  # fmt: skip


def linear(packing=None, *, bias=False, seed=0):
    mx.random.seed(seed)
    layer = nn.Linear(IN, OUT, bias=bias)
    if bias:
        layer.bias = mx.random.normal((OUT,))
    if packing is not None:
        mode, bits, group_size = packing
        layer = nn.QuantizedLinear.from_linear(layer, group_size, bits, mode=mode)
    return layer.freeze()


def adapted(base, kind, *, stirred=True, dropout=0.0):
    layer = add_adapter(base, "it", kind=kind, rank=RANK, scale=SCALE, dropout=dropout)
    if stirred:
        mx.random.seed(5)
        layer.lora_a = 0.1 * mx.random.normal(layer.lora_a.shape)
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
        if "m" in layer:
            layer.m = layer.m * (1 + 0.3 * mx.random.normal(layer.m.shape))
    return layer


def wide(array):
    return np.array(array.astype(mx.float32), np.float64)


def inputs(shape=(2, 7, IN)):
    return mx.random.normal(shape, key=mx.random.key(3))


def dora_by_hand(layer, x, cotangent):
    """Eq. 5 with its gradients, the norm a constant as in Eq. 11."""
    weight, m = wide(float32_weight(layer.linear)), wide(layer.m)
    a, b = wide(layer.lora_a), wide(layer.lora_b)
    moved = weight + SCALE * (a @ b).T
    stretch = m / np.linalg.norm(moved, axis=1)
    directed = wide(x).reshape(-1, IN) @ moved.T
    bias = wide(layer.linear.bias) if "bias" in layer.linear else 0.0
    back = wide(cotangent).reshape(-1, OUT)
    along, thin = back * stretch, wide(x).reshape(-1, IN) @ a
    return directed * stretch + bias, {
        "x": along @ moved,
        "lora_a": SCALE * wide(x).reshape(-1, IN).T @ (along @ b.T),
        "lora_b": SCALE * thin.T @ along,
        "m": (back * directed).sum(0) / np.linalg.norm(moved, axis=1),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packing", PACKINGS)
def test_dora_is_the_papers_equation_and_its_gradient(packing, bias):
    layer = adapted(linear(packing, bias=bias), "dora")
    x, cotangent = inputs(), mx.random.normal((2, 7, OUT), key=mx.random.key(4))
    expected, slopes = dora_by_hand(layer, x, cotangent)

    def product(values):
        layer.update({name: value for name, value in values.items() if name != "x"})
        return (layer(values["x"]) * cotangent).sum()

    np.testing.assert_allclose(wide(layer(x)).reshape(-1, OUT), expected, rtol=2e-5, atol=2e-5)
    found = mx.grad(product)({**named_arrays(layer.trainable_parameters()), "x": x})
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        largest = np.abs(slope).max()
        shaped = wide(found[name]).reshape(slope.shape)
        np.testing.assert_allclose(shaped, slope, rtol=1e-4, atol=2e-5 * largest, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("packing", [None, ("affine", 3, 64), ("nvfp4", 4, 16)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_fresh_adapter_changes_no_bit(kind, packing, dtype):
    mx.random.seed(1)
    base, table = linear(packing, bias=True), nn.Embedding(OUT, IN)
    base.set_dtype(dtype)
    table.set_dtype(dtype)
    x, ids = inputs().astype(dtype), mx.array([[1, 5], [23, 0]])
    fresh = adapted(base, kind, stirred=False)
    assert mx.array_equal(fresh(x), base(x))
    rows = adapted(table, kind, stirred=False)
    assert mx.array_equal(rows(ids), table(ids))
    assert mx.array_equal(rows.as_linear(x), table.as_linear(x))


def test_rows_of_zeros_stay_zeros_and_keep_their_gradients_numbers():
    """Vocabularies are padded with them; a row without length has no direction."""
    base = linear()
    base.weight[3] = 0
    layer = adapted(base, "dora", stirred=False)
    assert mx.array_equal(layer(inputs()), base(inputs()))
    gradients = nn.value_and_grad(layer, lambda layer, x: mx.square(layer(x)).sum())
    _, slopes = gradients(layer, inputs())
    assert all(mx.all(mx.isfinite(slope)).item() for slope in named_arrays(slopes).values())
    layer.lora_b = mx.ones_like(layer.lora_b)
    assert not mx.any(layer(inputs())[..., 3]).item()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("packed", [False, True])
def test_adapted_tied_embeddings_share_a_table_for_input_and_output(kind, packed):
    mx.random.seed(1)
    table = nn.Embedding(40, IN)
    table = (table.to_quantized(64, 4) if packed else table).freeze()
    layer = adapted(table, kind)
    rows = layer(mx.arange(40))
    x = inputs((5, IN))
    np.testing.assert_allclose(layer.as_linear(x), x @ rows.T, rtol=1e-4, atol=1e-4)
    moved = wide(float32_weight(table)) + SCALE * wide(layer.lora_a) @ wide(layer.lora_b)
    if kind == "dora":
        moved *= (wide(layer.m) / np.linalg.norm(moved, axis=1))[:, None]
    np.testing.assert_allclose(rows, moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_each_expert_has_its_own_adapter(packed, in_order):
    mx.random.seed(1)
    experts = SwitchLinear(64, 24, 4, bias=False)
    experts = (experts.to_quantized(64, 4) if packed else experts).freeze()
    layer = adapted(experts, "lora")
    assert (adapter_rank(layer), base_layer(layer) is experts) == (RANK, True)
    x = mx.random.normal((6, 1, 64), key=mx.random.key(3))
    met = mx.array([0, 0, 1, 2, 2, 3])
    found = layer(x, met, sorted_indices=in_order)
    weight = wide(float32_weight(experts))
    for token, expert in enumerate(met.tolist()):
        moved = weight[expert] + SCALE * wide(layer.lora_b[expert]) @ wide(layer.lora_a[expert])
        np.testing.assert_allclose(found[token, 0], moved @ wide(x[token, 0]), atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_sixteen_bits_stay_sixteen_bits_and_adapters_are_wide(kind):
    base, table, experts = linear(), nn.Embedding(OUT, IN), SwitchLinear(IN, OUT, 2, bias=False)
    x = inputs((3, 1, IN)).astype(mx.bfloat16)
    for part in (base, table, experts):
        part.set_dtype(mx.bfloat16)
    parts = [adapted(base, kind), adapted(table, kind)]
    outs = [parts[0](x), parts[1](mx.array([1])), parts[1].as_linear(x)]
    if kind == "lora":
        parts.append(adapted(experts.freeze(), kind))
        outs.append(parts[-1](x, mx.array([0, 1, 1])))
    assert {out.dtype for out in outs} == {mx.bfloat16}
    trained = [v for part in parts for v in (part.lora_a, part.lora_b, part.get("m", part.lora_a))]
    assert {value.dtype for value in trained} == {mx.float32}


def test_magnitudes_change_by_less_than_the_resolution_of_bfloat16():
    """1 + 3/1024 is 1 in bfloat16; 127/64 + 3/1024 of it is nearer to the next number, 255/128."""
    base = nn.Linear(1, 1, bias=False)
    base.weight = mx.ones((1, 1), mx.bfloat16)
    layer = adapted(base.freeze(), "dora", stirred=False)
    layer.m = layer.m * (1 + 3 / 1024)
    assert layer(mx.array([127 / 64], mx.bfloat16)).item() == 255 / 128


def test_dropout_is_on_the_adapters_input_alone_and_only_in_training():
    layer = adapted(linear(), "dora", dropout=0.5)
    assert adapter_dropout(layer) == 0.5
    assert not mx.array_equal(layer(inputs()), layer(inputs()))
    layer.lora_b = mx.zeros_like(layer.lora_b)
    assert mx.array_equal(layer(inputs()), layer(inputs()))
    layer = adapted(linear(), "dora", dropout=0.5).eval()
    assert mx.array_equal(layer(inputs()), adapted(linear(), "dora")(inputs()))


def test_what_has_no_adapter_is_refused():
    with pytest.raises(ModelError, match="`it`: a layer of type `RMSNorm` cannot have an adapter"):
        adapted(nn.RMSNorm(4), "lora")
    with pytest.raises(ConfigError, match="`it` is a layer of experts, for which mlx-lm and PEFT"):
        adapted(SwitchLinear(4, 4, 2), "dora")
