"""How much memory a training step is going to need: a first estimate, from shapes alone."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.arrays import flat
from mlx_dpo.policy.head import CHUNK_BYTES
from mlx_dpo.types import TokenizedPair

COPIES_OF_ADAPTERS = 5  # weights, gradient, accumulated gradient, two moments
LOGIT_ARRAYS = 4  # logits, exponentials, and the gradients of both
CHUNKS_IN_FLIGHT = 10  # measured: MLX works on about so many arrays of a chunk at once
KEPT_OF_LINEAR = 1.5  # measured: all that a block keeps, by inputs and outputs of its linear layers
KEPT_INPUTS = 0.06  # a block's input beside that


def parameter_bytes(model: nn.Module) -> int:
    """Memory of all weights as they are held."""
    return sum(value.nbytes for value in flat(model.parameters()).values())


def trainable_parameters(model: nn.Module) -> int:
    """Number of weights that training moves."""
    return sum(value.size for value in flat(model.trainable_parameters()).values())


def total_parameters(model: nn.Module) -> int:
    """Number of weights; packed ones are counted as the numbers they stand for."""
    total = sum(value.size for value in flat(model.parameters()).values())
    for _, module in model.named_modules():
        if "scales" in module and hasattr(module, "bits"):
            packed, scales = module["weight"], module["scales"]
            biases = module["biases"].size if "biases" in module else 0
            total += packed.size * 32 // module.bits - packed.size - scales.size - biases
    return total


def estimate_peak(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    vocab_size: int,
    shared: bool,
    recompute: bool,
) -> int:
    """Bytes at the peak of one pass over `pairs`, adapters attached.

    Weights, adapters with their gradients and moments, what the backward pass keeps of the
    linear layers, and float32 logits: of all positions with the plain scorer, of a few chunks
    with the shared one.
    """
    item = mx.float32.size
    widths = [_widths(layer) for layer in model.layers]
    if shared:
        tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
        scored = sum(len(p.chosen) + len(p.rejected) for p in pairs)
        logits = CHUNKS_IN_FLIGHT * min(CHUNK_BYTES, scored * vocab_size * item)
    else:
        tokens = 2 * len(pairs) * max(len(p) for p in pairs)
        logits = LOGIT_ARRAYS * tokens * vocab_size * item
    kept = max(widths) + sum(widths) * KEPT_INPUTS if recompute else sum(widths)
    activations = int(tokens * KEPT_OF_LINEAR * kept * item)
    adapters = COPIES_OF_ADAPTERS * trainable_parameters(model) * item
    return parameter_bytes(model) + adapters + activations + logits


def _widths(layer: nn.Module) -> int:
    """Inputs and outputs of the adapted layers of a block, added up."""
    adapted = [m for _, m in layer.named_modules() if "lora_a" in m]
    return sum(m["lora_a"].shape[0] + m["lora_b"].shape[-1] for m in adapted)
