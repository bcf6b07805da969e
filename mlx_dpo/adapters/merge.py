"""A policy -> a plain model: adapters go into the weights that they are beside.

Sums are taken in float32 and rounded once. How much of what the adapters change survives that
rounding is counted layer by layer.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.adapters import master_weights as masters
from mlx_dpo.adapters.attach import adapted_layers
from mlx_dpo.adapters.layers import DORA_TYPES, LoRAEmbedding, LoRASwitchLinear, base_layer
from mlx_dpo.io.arrays import scalar
from mlx_dpo.models.device import PLAIN_LAYERS, cast_model, dequantize_layer, float32_weight


@dataclass(frozen=True)
class RoundingLoss:
    """What number type and packing leave of the adapters' change of the weights."""

    kept: float  # the change that is left, projected on the whole one
    cosine: float  # between the two: near 0 what is left is noise


@dataclass(frozen=True)
class AffineQuantization:
    """Bits and group of affine quantisation."""

    bits: int
    group_size: int

    def rounded(self, weight: mx.array) -> mx.array:
        """The weight as it is after packing; as it was where the groups do not fit."""
        if weight.shape[-1] % self.group_size:
            return weight
        packed, scales, biases = mx.quantize(weight, group_size=self.group_size, bits=self.bits)
        return mx.dequantize(packed, scales, biases, group_size=self.group_size, bits=self.bits)


def merged_weight(adapted: nn.Module, weight: mx.array) -> mx.array:
    """`weight` with the adapter in it. (..., out, in) float32

    DoRA's magnitudes are those of the rows afterwards.
    """
    a, b = adapted.lora_a, adapted.lora_b
    if isinstance(adapted, LoRASwitchLinear):
        added = b @ a
    else:
        added = a @ b if isinstance(adapted, LoRAEmbedding) else (a @ b).T
    whole = weight.astype(mx.float32) + adapted.scale * added
    if isinstance(adapted, DORA_TYPES):
        norms = mx.linalg.norm(whole, axis=-1)
        # A row of zeros has no direction to be stretched in.
        whole = whole * mx.where(norms > 0, adapted.m / norms, 1.0)[:, None]
    return whole


def merge_adapters(
    model: nn.Module, dtype: mx.Dtype, packed: AffineQuantization | None = None
) -> RoundingLoss | None:
    """Put the adapters into the weights, unpack every layer and hold it in `dtype`.

    Returns:
        What is left of the adapters' change, also once the model is `packed`; None where
        weights of the model itself were trained.
    """
    sums = mx.zeros((3,))
    for path, adapted in adapted_layers(model).items():
        before = float32_weight(base_layer(adapted))
        whole = merged_weight(adapted, before)
        plain = _plain_layer(base_layer(adapted), whole.astype(dtype), path)
        left = packed.rounded(plain.weight) if packed else plain.weight
        change, kept = whole - before, left.astype(mx.float32) - before
        sums = sums + mx.stack(
            [(change * kept).sum(), mx.square(change).sum(), mx.square(kept).sum()]
        )
        mx.eval(sums, plain.parameters())
        model.update_modules(tree_unflatten([(path, plain)]))
    masters.drop_master_weights(model)
    for path, module in [(p, m) for p, m in model.named_modules() if type(m) in PLAIN_LAYERS]:
        model.update_modules(tree_unflatten([(path, dequantize_layer(module, dtype, path))]))
    cast_model(model, dtype)
    crossed, whole_size, left_size = (scalar(value) for value in sums)
    if not whole_size:
        return None
    return RoundingLoss(crossed / whole_size, crossed / max((whole_size * left_size) ** 0.5, 1e-30))


def _plain_layer(layer: nn.Module, weight: mx.array, path: str) -> nn.Module:
    if type(layer) in PLAIN_LAYERS:
        layer = dequantize_layer(layer, weight.dtype, path)
    layer.weight = weight
    return layer
