"""Memory of a model and of its training, estimated from array shapes without running the model."""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_dpo.adapters.master_weights import has_master_weights
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.sharded.shard_model import find_shards
from mlx_dpo.types import TokenizedPair

# Copies of the trained weights in memory, besides the optimizer's state. In a pass: the weights
# and two gradients. In the update: gradient, clipped gradient, new weights, two intermediate ones.
TRAINING_COPIES = 3
UPDATE_COPIES = 5

# For the upper bound only, above all measurements.
SAVED_PER_LINEAR = 2.0  # activations of a layer, relative to inputs and outputs of linear layers
SAVED_SCORE_ARRAYS = 3  # arrays of attention scores, in models that write out their softmax
LOGIT_ARRAYS = 6  # float32 arrays over the whole vocabulary
MAX_EXPERTS_PER_TOKEN = 8


def parameter_bytes(model: nn.Module) -> int:
    """Return the memory of all parameters of the model that this process holds, in bytes."""
    shards = find_shards(model)
    absent = 0 if shards is None else shards.absent_bytes
    return sum(value.nbytes for value in named_arrays(model.parameters()).values()) - absent


def trainable_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(value.size for value in named_arrays(model.trainable_parameters()).values())


def trainable_bytes(model: nn.Module) -> int:
    """Return the memory of the trainable parameters in bytes, which is also that of gradients."""
    return sum(value.nbytes for value in named_arrays(model.trainable_parameters()).values())


def total_parameters(model: nn.Module) -> int:
    """Return the number of parameters; a quantized matrix counts as its original weights."""
    total = sum(value.size for value in named_arrays(model.parameters()).values())
    for _, module in model.named_modules():
        if "scales" in module and hasattr(module, "bits"):
            packed, scales = module["weight"], module["scales"]
            biases = module["biases"].size if "biases" in module else 0
            total += packed.size * 32 // module.bits - packed.size - scales.size - biases
    return total


def base_parameters(model: nn.Module) -> int:
    """Return the number of parameters of the model, not counting its adapters."""
    adapters = 0 if has_master_weights(model) else trainable_parameters(model)
    return total_parameters(model) - adapters


def resident_bytes(model: nn.Module, optimizer_bytes: int) -> int:
    """Return the memory in bytes that training holds between passes.

    This is the memory of the weights, the attached adapters and the optimizer state.
    """
    return parameter_bytes(model) + optimizer_bytes


def step_peak_bytes(model: nn.Module, pass_bytes: int, optimizer_bytes: int) -> int:
    """Return the peak memory of an optimizer step in bytes.

    The peak is reached either in the forward and backward pass or in the update.

    Args:
        pass_bytes: memory of the forward and backward pass, in addition to resident memory.
        optimizer_bytes: memory of the optimizer state.
    """
    update = UPDATE_COPIES * trainable_bytes(model)
    return resident_bytes(model, optimizer_bytes) + max(pass_bytes, update)


def step_peak_upper_bound(
    model: nn.Module,
    config: dict[str, Any],
    pairs: Sequence[TokenizedPair],
    *,
    vocab_size: int,
    optimizer_bytes: int,
) -> int | None:
    """Return a rough upper bound in bytes of a step's peak memory, with `pairs` in a single pass.

    The bound is several times too high and holds for every scorer. It shows quickly that memory
    suffices. The result is None for recurrent models, because array shapes do not determine how
    much their backward pass saves.
    """
    if any(isinstance(cache, ArraysCache) for cache in _flat_caches(make_prompt_cache(model))):
        return None
    rows, width = 2 * len(pairs), max(len(pair) for pair in pairs)
    linear = sum(_linear_width(module) for layer in model.layers for module in layer.modules())
    heads = int((config.get("text_config") or config).get("num_attention_heads") or 0)
    scores = SAVED_SCORE_ARRAYS * heads * width * len(model.layers)
    per_token = SAVED_PER_LINEAR * linear + scores + LOGIT_ARRAYS * vocab_size
    activations = int(rows * width * per_token * mx.float32.size)
    if (shards := find_shards(model)) is not None:
        activations += shards.gathered_bytes
    return step_peak_bytes(model, activations + 2 * trainable_bytes(model), optimizer_bytes)


def _flat_caches(caches: Iterable[Any]) -> Iterable[Any]:
    """Yield each cache, followed by the caches nested in it."""
    for cache in caches:
        yield cache
        yield from _flat_caches(getattr(cache, "caches", ()))


def _linear_width(module: nn.Module) -> int:
    """Return the input width plus the output width of a linear layer; 0 for other modules."""
    weight = module.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim < 2:
        return 0
    bits = module.bits if "scales" in module and hasattr(module, "bits") else 32
    experts = min(MAX_EXPERTS_PER_TOKEN, weight.shape[0]) if weight.ndim > 2 else 1
    return experts * (weight.shape[-2] + weight.shape[-1] * 32 // bits)
