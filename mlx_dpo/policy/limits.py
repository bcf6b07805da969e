"""How much memory there is, for training and for the buffers that MLX keeps for later use."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dpo.errors import ConfigError
from mlx_dpo.policy.allocator import keep_freed_memory
from mlx_dpo.policy.device import DeviceKind, device_kind, on_cpu

RECOMMENDED = "max_recommended_working_set_size"
GIBIBYTE = 2**30
# What Metal recommends by default, as llama.cpp logs it on Macs: 10922.67 MiB of 16 GiB,
# 21845.34 of 32, 49152 of 64, 73728 of 96. Later systems allow more of large machines.
LARGE_MAC = 36 * GIBIBYTE
SHARE, SHARE_OF_LARGE = 2 / 3, 3 / 4

CACHED = 1 / 4  # of the recommended memory: buffers of other lengths must not pile up
WIRED = 1 / 2  # kept from being swapped; wiring nearly all of a Mac's memory has made it panic


@dataclass(frozen=True)
class Room:
    """Memory that training may use."""

    bytes: int
    what: str  # which that is, for a person


def room_here() -> Room:
    """What Metal recommends, or MLX's own limit where that is lower or there is no Metal."""
    limit = mx.get_memory_limit()
    recommended = mx.device_info(mx.default_device()).get(RECOMMENDED)
    if recommended and int(recommended) <= limit:
        return Room(int(recommended), "what Metal recommends on this Mac")
    return Room(limit, "MLX's limit on this machine")


def room_of_mac(memory: str) -> Room:
    """What Metal recommends on a Mac with this `memory`: `16GB`, `16 GiB` or `16g`.

    As memory is sold, a GB has 2^30 bytes here.

    Raises:
        ConfigError: it is no such number.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:g|gb|gib)\s*", memory, re.IGNORECASE)
    size = int(float(found[1]) * GIBIBYTE) if found else 0
    if not size:
        raise ConfigError(f"`memory` must be like 16GB, got `{memory}`")
    large = size >= LARGE_MAC
    share, words = (SHARE_OF_LARGE, "three quarters") if large else (SHARE, "two thirds")
    return Room(int(size * share), f"{words} of a Mac's {memory.strip()}, as Metal recommends")


class BufferLimits(NamedTuple):
    """MLX's own limits, in bytes."""

    cache: int  # buffers kept for later use
    wired: int


def buffer_limits(kind: DeviceKind, info: Mapping[str, Any]) -> BufferLimits | None:
    """Limits for a run on a device of these facts; None where MLX's own are right."""
    recommended = info.get(RECOMMENDED)
    if kind != "metal" or not recommended:
        return None
    return BufferLimits(int(CACHED * recommended), int(WIRED * recommended))


@contextmanager
def bounded_buffers() -> Iterator[BufferLimits | None]:
    """Inside the block MLX keeps to `buffer_limits`, afterwards to what it kept to before.

    On the CPU buffers come from the C library, which is told to keep them.
    """
    if on_cpu():
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
