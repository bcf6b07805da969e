"""What a model and its training hold in memory, as far as shapes alone tell."""

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_dpo.adapters.master_weights import has_master_weights
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.device import DeviceKind, device_kind, is_cpu
from mlx_dpo.types import TokenizedPair

TRAINING_COPIES = 3  # of the adapters: weights, two gradients; beside the optimizer's state
UPDATE_COPIES = 5  # of the adapters: gradient, clipped too, moved, and two on the way there

# For the bound alone, on the safe side of all that was measured.
SAVED_PER_LINEAR = 2.0  # what a block keeps, by inputs and outputs of its linear layers
SAVED_SCORE_ARRAYS = (
    3  # arrays of all heads' attention scores, in models that write out their softmax
)
LOGIT_ARRAYS = 6  # float32 arrays over the whole vocabulary
MAX_EXPERTS_PER_TOKEN = 8


def parameter_bytes(model: nn.Module) -> int:
    """Memory of all weights as they are held."""
    return sum(value.nbytes for value in named_arrays(model.parameters()).values())


def trainable_parameters(model: nn.Module) -> int:
    """Number of weights that training moves."""
    return sum(value.size for value in named_arrays(model.trainable_parameters()).values())


def trainable_bytes(model: nn.Module) -> int:
    """Memory of the weights that training moves, which is that of their gradient."""
    return sum(value.nbytes for value in named_arrays(model.trainable_parameters()).values())


def total_parameters(model: nn.Module) -> int:
    """Number of weights; packed ones are counted as the numbers they stand for."""
    total = sum(value.size for value in named_arrays(model.parameters()).values())
    for _, module in model.named_modules():
        if "scales" in module and hasattr(module, "bits"):
            packed, scales = module["weight"], module["scales"]
            biases = module["biases"].size if "biases" in module else 0
            total += packed.size * 32 // module.bits - packed.size - scales.size - biases
    return total


def base_parameters(model: nn.Module) -> int:
    """Number of weights of the model without adapters."""
    adapters = 0 if has_master_weights(model) else trainable_parameters(model)
    return total_parameters(model) - adapters


def resident_bytes(model: nn.Module, state: int) -> int:
    """Bytes of weights, adapters and the optimizer's `state`, adapters attached."""
    return parameter_bytes(model) + state


def step_peak_bytes(model: nn.Module, pass_bytes: int, state: int) -> int:
    """Bytes at the peak of an optimizer step: of its largest pass, or of the update."""
    update = UPDATE_COPIES * trainable_bytes(model)
    return resident_bytes(model, state) + max(pass_bytes, update)


def step_peak_upper_bound(
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
    if any(isinstance(cache, ArraysCache) for cache in _flat_caches(make_prompt_cache(model))):
        return None
    item = mx.float32.size
    rows, width = 2 * len(pairs), max(len(pair) for pair in pairs)
    widths = sum(_linear_width(module) for layer in model.layers for module in layer.modules())
    heads = int((config.get("text_config") or config).get("num_attention_heads") or 0)
    scores = SAVED_SCORE_ARRAYS * heads * width * len(model.layers)
    a_token = SAVED_PER_LINEAR * widths + scores + LOGIT_ARRAYS * vocab_size
    return step_peak_bytes(
        model, int(rows * width * a_token * item) + 2 * trainable_bytes(model), state
    )


def _flat_caches(caches: Iterable[Any]) -> Iterable[Any]:
    for cache in caches:
        yield cache
        yield from _flat_caches(getattr(cache, "caches", ()))


def _linear_width(module: nn.Module) -> int:
    """Inputs and outputs of a layer that multiplies by a matrix, for one token."""
    weight = module.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim < 2:
        return 0
    bits = module.bits if "scales" in module and hasattr(module, "bits") else 32
    experts = min(MAX_EXPERTS_PER_TOKEN, weight.shape[0]) if weight.ndim > 2 else 1
    return experts * (weight.shape[-2] + weight.shape[-1] * 32 // bits)


# What malloc.h of glibc calls M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD: only larger
# blocks than this are mapped one by one, so many bytes stay at the heap's end, and it grows so.
MALLOC_OPTIONS = {-3: 2**25, -1: 2**31 - 1, -2: 2**28}


def keep_freed_memory() -> bool:
    """Let the process hand freed arrays out again, from now on; True if it will.

    Whoever has set the library's own variables (`MALLOC_TRIM_THRESHOLD_` and the like) has
    decided already. Other C libraries have nothing to set.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(what, size) == 1 for what, size in MALLOC_OPTIONS.items()])


RECOMMENDED_BYTES_KEY = "max_recommended_working_set_size"
GIBIBYTE = 2**30
# What Metal recommends by default, as llama.cpp logs it on Macs: 10922.67 MiB of 16 GiB,
# 21845.34 of 32, 49152 of 64, 73728 of 96. Later systems allow more of large machines.
LARGE_MAC_BYTES = 36 * GIBIBYTE
RECOMMENDED_SHARE, LARGE_MAC_SHARE = 2 / 3, 3 / 4

CACHE_SHARE = 1 / 4  # of the recommended memory: buffers of other lengths must not pile up
WIRED_SHARE = (
    1 / 2
)  # kept from being swapped; wiring nearly all of a Mac's memory has made it panic


@dataclass(frozen=True)
class MemoryBudget:
    """Memory that training may use."""

    bytes: int
    what: str  # which that is, for a person


def available_memory() -> MemoryBudget:
    """What Metal recommends, or MLX's own limit where that is lower or there is no Metal."""
    limit = mx.get_memory_limit()
    recommended = mx.device_info(mx.default_device()).get(RECOMMENDED_BYTES_KEY)
    if recommended and int(recommended) <= limit:
        return MemoryBudget(int(recommended), "what Metal recommends on this Mac")
    return MemoryBudget(limit, "MLX's limit on this machine")


def mac_memory(memory: str) -> MemoryBudget:
    """What Metal recommends on a Mac with this `memory`: `16GB`, `16 GiB` or `16g`.

    As memory is sold, a GB has 2^30 bytes here.

    Raises:
        ConfigError: it is no such number.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:g|gb|gib)\s*", memory, re.IGNORECASE)
    size = int(float(found[1]) * GIBIBYTE) if found else 0
    if not size:
        raise ConfigError(f"`memory` must be like 16GB, got `{memory}`")
    large = size >= LARGE_MAC_BYTES
    share, words = (
        (LARGE_MAC_SHARE, "three quarters") if large else (RECOMMENDED_SHARE, "two thirds")
    )
    return MemoryBudget(
        int(size * share), f"{words} of a Mac's {memory.strip()}, as Metal recommends"
    )


class BufferLimits(NamedTuple):
    """MLX's own limits, in bytes."""

    cache: int  # buffers kept for later use
    wired: int


def buffer_limits(kind: DeviceKind, info: Mapping[str, Any]) -> BufferLimits | None:
    """Limits for a run on a device of these facts; None where MLX's own are right."""
    recommended = info.get(RECOMMENDED_BYTES_KEY)
    if kind != "metal" or not recommended:
        return None
    return BufferLimits(int(CACHE_SHARE * recommended), int(WIRED_SHARE * recommended))


@contextmanager
def limited_buffers() -> Iterator[BufferLimits | None]:
    """Inside the block MLX keeps to `buffer_limits`, afterwards to what it kept to before.

    On the CPU buffers come from the C library, which is told to keep them.
    """
    if is_cpu():
        keep_freed_memory()
    limits = buffer_limits(device_kind(), mx.device_info(mx.default_device()))
    if limits is None:
        yield None
        return
    cache, wired = mx.set_cache_limit(limits.cache), mx.set_wired_limit(limits.wired)
    try:
        yield limits
    finally:
        mx.set_wired_limit(wired)
        mx.set_cache_limit(cache)
