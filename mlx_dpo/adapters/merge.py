"""Merge adapters into the weights of their base layers, and measure how much rounding changes.

Weight and adapter are added in float32, and the sum is rounded once.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.adapters import master_weights
from mlx_dpo.adapters.attach import adapted_layers
from mlx_dpo.adapters.layers import DORA_TYPES, LoRAEmbedding, LoRASwitchLinear, base_layer
from mlx_dpo.io.arrays import scalar
from mlx_dpo.models.device import PLAIN_LAYERS, cast_model, dequantize_layer, float32_weight


@dataclass(frozen=True)
class MergeRetention:
    """How much of the weight change by the adapters remains after rounding and quantization."""

    retained: float  # projection of the remaining change on the whole change, as a share of it
    cosine: float  # of the remaining and the whole change; near 0 what remains is noise


@dataclass(frozen=True)
class AffineQuantization:
    """Bits and group size of affine quantization."""

    bits: int
    group_size: int

    def round_trip(self, weight: mx.array) -> mx.array:
        """Return the weight quantized and dequantized again.

        A weight whose width is not a multiple of the group size is returned unchanged.
        """
        if weight.shape[-1] % self.group_size:
            return weight
        packed, scales, biases = mx.quantize(weight, group_size=self.group_size, bits=self.bits)
        return mx.dequantize(packed, scales, biases, group_size=self.group_size, bits=self.bits)


def merged_weight(adapted: nn.Module, weight: mx.array) -> mx.array:
    """Return `weight` with the adapter of the layer `adapted` merged. (..., out, in) float32

    With DoRA, every row of the result is scaled so that its norm is the learned magnitude.
    """
    a, b = adapted.lora_a, adapted.lora_b
    if isinstance(adapted, LoRASwitchLinear):
        change = b @ a
    else:
        change = a @ b if isinstance(adapted, LoRAEmbedding) else (a @ b).T
    merged = weight.astype(mx.float32) + adapted.scale * change
    if isinstance(adapted, DORA_TYPES):
        norms = mx.linalg.norm(merged, axis=-1)
        # A row of zeros has no direction that could be scaled.
        merged = merged * mx.where(norms > 0, adapted.m / norms, 1.0)[:, None]
    return merged


def merge_adapters(
    model: nn.Module, dtype: mx.Dtype, quantization: AffineQuantization | None = None
) -> MergeRetention | None:
    """Merge the model's adapters into its weights, dequantize all layers and cast them to `dtype`.

    Args:
        quantization: Quantization that the caller applies to the model afterwards, or None.

    Returns:
        How much of the adapters' change remains after rounding and `quantization`; None if the
        model has no adapters (full fine-tuning) or its adapters change nothing.
    """
    sums = mx.zeros((3,))
    for path, adapted in adapted_layers(model).items():
        before = float32_weight(base_layer(adapted))
        merged = merged_weight(adapted, before)
        plain = _plain_layer(base_layer(adapted), merged.astype(dtype), path)
        rounded = quantization.round_trip(plain.weight) if quantization else plain.weight
        change, survived = merged - before, rounded.astype(mx.float32) - before
        sums = sums + mx.stack(
            [(change * survived).sum(), mx.square(change).sum(), mx.square(survived).sum()]
        )
        mx.eval(sums, plain.parameters())
        model.update_modules(tree_unflatten([(path, plain)]))
    master_weights.drop_master_weights(model)
    for path, module in [(p, m) for p, m in model.named_modules() if type(m) in PLAIN_LAYERS]:
        model.update_modules(tree_unflatten([(path, dequantize_layer(module, dtype, path))]))
    cast_model(model, dtype)
    product, change_square, survived_square = (scalar(value) for value in sums)
    if not change_square:
        return None
    norms = max((change_square * survived_square) ** 0.5, 1e-30)
    return MergeRetention(product / change_square, product / norms)


def _plain_layer(layer: nn.Module, weight: mx.array, path: str) -> nn.Module:
    if type(layer) in PLAIN_LAYERS:
        layer = dequantize_layer(layer, weight.dtype, path)
    layer.weight = weight
    return layer
