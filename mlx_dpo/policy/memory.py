"""What a model and its training hold in memory, as far as shapes alone tell."""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_dpo.arrays import flat
from mlx_dpo.policy.masters import has_masters
from mlx_dpo.types import TokenizedPair

COPIES_IN_TRAINING = 3  # of the adapters: weights, two gradients; beside the optimizer's state
COPIES_IN_UPDATE = 5  # of the adapters: gradient, clipped too, moved, and two on the way there

# For the bound alone, on the safe side of all that was measured.
KEPT_OF_LINEAR = 2.0  # what a block keeps, by inputs and outputs of its linear layers
KEPT_SCORES = 3  # arrays of all heads' attention scores, in models that write out their softmax
LOGIT_ARRAYS = 6  # float32 arrays over the whole vocabulary
EXPERTS_OF_TOKEN = 8


def parameter_bytes(model: nn.Module) -> int:
    """Memory of all weights as they are held."""
    return sum(value.nbytes for value in flat(model.parameters()).values())


def trainable_parameters(model: nn.Module) -> int:
    """Number of weights that training moves."""
    return sum(value.size for value in flat(model.trainable_parameters()).values())


def trainable_bytes(model: nn.Module) -> int:
    """Memory of the weights that training moves, which is that of their gradient."""
    return sum(value.nbytes for value in flat(model.trainable_parameters()).values())


def total_parameters(model: nn.Module) -> int:
    """Number of weights; packed ones are counted as the numbers they stand for."""
    total = sum(value.size for value in flat(model.parameters()).values())
    for _, module in model.named_modules():
        if "scales" in module and hasattr(module, "bits"):
            packed, scales = module["weight"], module["scales"]
            biases = module["biases"].size if "biases" in module else 0
            total += packed.size * 32 // module.bits - packed.size - scales.size - biases
    return total


def base_parameters(model: nn.Module) -> int:
    """Number of weights of the model without adapters."""
    adapters = 0 if has_masters(model) else trainable_parameters(model)
    return total_parameters(model) - adapters


def held_in_training(model: nn.Module, state: int) -> int:
    """Bytes of weights, adapters and the optimizer's `state`, adapters attached."""
    return parameter_bytes(model) + state


def step_peak(model: nn.Module, pass_bytes: int, state: int) -> int:
    """Bytes at the peak of an optimizer step: of its largest pass, or of the update."""
    update = COPIES_IN_UPDATE * trainable_bytes(model)
    return held_in_training(model, state) + max(pass_bytes, update)


def at_most(
    model: nn.Module,
    config: dict[str, Any],
    pairs: Sequence[TokenizedPair],
    *,
    vocab_size: int,
    state: int,
) -> int | None:
    """Bytes that no step over `pairs` in one pass reaches, whatever the scorer, or None.

    A rough bound, several times too high, for telling at once that there is room enough.
    None for models with a state of their own (recurrences), whose shapes do not tell what the
    gradient keeps.
    """
    if any(isinstance(cache, ArraysCache) for cache in _caches(make_prompt_cache(model))):
        return None
    item = mx.float32.size
    rows, width = 2 * len(pairs), max(len(pair) for pair in pairs)
    widths = sum(_widths(module) for layer in model.layers for module in layer.modules())
    heads = int((config.get("text_config") or config).get("num_attention_heads") or 0)
    scores = KEPT_SCORES * heads * width * len(model.layers)
    a_token = KEPT_OF_LINEAR * widths + scores + LOGIT_ARRAYS * vocab_size
    return step_peak(model, int(rows * width * a_token * item) + 2 * trainable_bytes(model), state)


def _caches(caches: Iterable[Any]) -> Iterable[Any]:
    for cache in caches:
        yield cache
        yield from _caches(getattr(cache, "caches", ()))


def _widths(module: nn.Module) -> int:
    """Inputs and outputs of a layer that multiplies by a matrix, for one token."""
    weight = module.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim < 2:
        return 0
    bits = module.bits if "scales" in module and hasattr(module, "bits") else 32
    experts = min(EXPERTS_OF_TOKEN, weight.shape[0]) if weight.ndim > 2 else 1
    return experts * (weight.shape[-2] + weight.shape[-1] * 32 // bits)
