"""How much memory a training step is going to need: a first estimate, from shapes alone."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.arrays import flat

COPIES_OF_ADAPTERS = 5  # weights, gradient, accumulated gradient, two moments


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
    model: nn.Module, config: dict[str, Any], *, rows: int, length: int, vocab_size: int
) -> int:
    """Bytes at the peak of a step over `rows` rows of `length` tokens with the plain scorer.

    Weights, adapters with their gradients and moments, what the backward pass keeps of every
    linear layer and of attention, and three float32 arrays of logits.
    """
    item = mx.float32.size
    widths, blocks = 0, len(model.layers)
    for layer in model.layers:
        for _, module in layer.named_modules():
            if "lora_a" in module:
                widths += module["lora_a"].shape[0] + module["lora_b"].shape[-1]
    heads = int(config.get("num_attention_heads") or 0)
    per_token = 2 * widths * item + 3 * blocks * heads * length * item + 3 * vocab_size * item
    adapters = COPIES_OF_ADAPTERS * trainable_parameters(model) * item
    return parameter_bytes(model) + adapters + rows * length * per_token
