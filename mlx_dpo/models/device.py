"""Query MLX's default device, and cast or dequantize a model's weights for this device.

MLX's CPU backend multiplies quantized and 16-bit matrices in plain loops, but float32 matrices with
the much faster BLAS. On the CPU a model is therefore held in float32, with the same weights.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten
from mlx_lm.models.afm7 import FusedLinear, FusedQuantizedLinear
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import named_arrays

DeviceKind = Literal["metal", "cuda", "cpu"]

# The plain layer of each quantized layer. Types are matched exactly: a subclass may compute
# something else. Sizes do not matter, because the weight is set afterwards.
PLAIN_LAYERS: dict[type, Callable[[Any], nn.Module]] = {
    nn.QuantizedLinear: lambda packed: nn.Linear(1, 1, bias=False),
    nn.QuantizedEmbedding: lambda packed: nn.Embedding(1, 1),
    QuantizedSwitchLinear: lambda packed: SwitchLinear(1, 1, 1, bias=False),
    QuantizedMultiLinear: lambda packed: MultiLinear(1, 1, 1),
    FusedQuantizedLinear: lambda packed: FusedLinear(1, packed.output_dims),
}


def device_kind() -> DeviceKind:
    """Return the kind of MLX's default device: `metal`, `cuda` or `cpu`."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def is_cpu() -> bool:
    """Return whether MLX's default device is the CPU."""
    return device_kind() == "cpu"


def dtype_name(dtype: mx.Dtype) -> str:
    """Return the name of a dtype: `float32` for `mx.float32`."""
    return str(dtype).removeprefix("mlx.core.")


def main_dtype(model: nn.Module) -> str:
    """Return the name of the dtype that most bytes of the floating-point weights have."""
    bits: Counter[str] = Counter()
    for value in named_arrays(model.parameters()).values():
        if mx.issubdtype(value.dtype, mx.floating):
            bits[dtype_name(value.dtype)] += value.nbytes
    return max(bits, key=lambda name: bits[name])


def cast_model(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the model's floating-point parameters to `dtype`.

    Parameters that the model's `cast_predicate` excludes keep their dtype.
    """
    wanted = getattr(model, "cast_predicate", lambda name: True)

    def convert(name: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(dtype) if floating and wanted(name) else value

    model.update(tree_map_with_path(convert, model.parameters()))


def prepare_for_cpu(model: nn.Module, dtype: mx.Dtype = mx.float32) -> tuple[str, ...]:
    """Dequantize the model and cast its weights to `dtype`.

    In float32 the weights keep their values to the last bit. Layers are dequantized one at a time,
    so that no second model is held in memory.

    Returns:
        Notes for the user on what was dequantized and cast.

    Raises:
        ModelError: the CPU backend cannot dequantize a layer.
    """
    stored = _stored_dtypes(model)
    bits = _dequantize_layers(model, dtype)
    _cast_weights(model, dtype)
    target = dtype_name(dtype)
    notes = []
    if bits:
        widths = " and ".join(str(width) for width in sorted(bits))
        notes.append(f"{widths}-bit weights dequantized to {target} (faster on the CPU backend)")
    if num_packed := sum("scales" in module for module in model.modules()):
        layers = "1 layer" if num_packed == 1 else f"{num_packed} layers"
        notes.append(f"{layers} left quantized (not supported here), which is slow on the CPU")
    if stored - {target}:
        names = " and ".join(sorted(stored - {target}))
        notes.append(f"{names} weights converted to {target} (faster on the CPU backend)")
    return tuple(notes)


def _stored_dtypes(model: nn.Module) -> set[str]:
    """Return the dtypes of the floating-point weights of layers that are not quantized."""
    return {
        dtype_name(value.dtype)
        for module in model.modules()
        if "scales" not in module
        for value in module.values()
        if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
    }


def _dequantize_layers(model: nn.Module, dtype: mx.Dtype) -> Counter[int]:
    """Dequantize the layers one by one.

    Returns:
        Number of dequantized layers, keyed by bits per weight.
    """
    packed = [(name, m) for name, m in model.named_modules() if type(m) in PLAIN_LAYERS]
    bits: Counter[int] = Counter()
    while packed:  # popped, so that each quantized weight is freed before the next layer
        name, module = packed.pop()
        bits[module.bits] += 1
        model.update_modules(tree_unflatten([(name, dequantize_layer(module, dtype, name))]))
    return bits


def dequantize_layer(
    packed: nn.Module, dtype: mx.Dtype = mx.float32, name: str = "layer"
) -> nn.Module:
    """Return a plain layer with the dequantized weight of the quantized layer `packed`.

    Args:
        dtype: Dtype of the new layer's weight.
        name: Name of the layer for error messages.

    Raises:
        ModelError: the weights have a global scale, which the CPU backend cannot read.
    """
    if packed.get("global_scale") is not None:
        raise ModelError(
            f"{name}: quantized as nvfp4 with a global scale, which MLX supports only on a GPU; "
            "use a model without a global scale"
        )
    weight = float32_weight(packed)
    plain = PLAIN_LAYERS[type(packed)](packed)
    plain.weight = weight.astype(dtype)
    if "bias" in packed:
        plain.bias = packed["bias"].astype(dtype)
    mx.eval(plain.parameters())
    return plain


def float32_weight(layer: nn.Module) -> mx.array:
    """Return the weight of a layer in float32, dequantized if necessary."""
    if "scales" not in layer:
        weight: mx.array = layer["weight"]
        return weight.astype(mx.float32)
    # With 16-bit scales every dequantized weight would be rounded once more.
    biases = layer.get("biases")  # only affine quantization has biases
    return mx.dequantize(
        layer["weight"],
        _to_float32(layer["scales"]),
        None if biases is None else _to_float32(biases),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )


def _to_float32(value: mx.array) -> mx.array:
    """Cast floating-point quantization scales to float32; return integer scales unchanged.

    All quantization modes except `affine` have integer scales.
    """
    floating = mx.issubdtype(value.dtype, mx.floating)
    return value.astype(mx.float32) if floating else value


def _cast_weights(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the model's weights to `dtype`, one array at a time.

    Each old array is freed before the next array is cast.
    """
    stored = named_arrays(model.parameters())
    while stored:
        name, value = stored.popitem()
        if mx.issubdtype(value.dtype, mx.floating) and value.dtype != dtype:
            wide = value.astype(dtype)
            mx.eval(wide)
            model.update(tree_unflatten([(name, wide)]))
