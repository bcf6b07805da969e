"""Memory of the device: size available to training, MLX's limits, and reuse of freed memory."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dpo.errors import ConfigError
from mlx_dpo.models.device import DeviceKind, device_kind, is_cpu

RECOMMENDED_BYTES_KEY = "max_recommended_working_set_size"
GIBIBYTE = 2**30
# What Metal recommends by default, as llama.cpp logs it on Macs: 10922.67 MiB of 16 GiB,
# 21845.34 of 32, 49152 of 64, 73728 of 96. Later systems allow more of large machines.
LARGE_MAC_BYTES = 36 * GIBIBYTE
RECOMMENDED_SHARE, LARGE_MAC_SHARE = 2 / 3, 3 / 4

# Shares of the recommended memory. Buffers cached by MLX must not pile up over many lengths.
# Wired memory is not swapped; wiring nearly all of a Mac's memory has made it panic.
CACHE_SHARE = 1 / 4
WIRED_SHARE = 1 / 2


@dataclass(frozen=True)
class MemoryBudget:
    """Number of bytes that training may use, and where the number comes from."""

    bytes: int
    description: str  # where the number comes from, for the user

    def shared_by(self, ranks: int) -> "MemoryBudget":
        """Return the share of each of several ranks on one machine."""
        if ranks == 1:
            return self
        return MemoryBudget(self.bytes // ranks, f"{self.description}, shared by {ranks} ranks")


def available_memory() -> MemoryBudget:
    """Return the memory that training may use on this machine.

    This is the size that Metal recommends, or MLX's memory limit if that is lower. Without Metal,
    it is MLX's memory limit.
    """
    limit = mx.get_memory_limit()
    recommended = mx.device_info(mx.default_device()).get(RECOMMENDED_BYTES_KEY)
    if recommended and int(recommended) <= limit:
        return MemoryBudget(int(recommended), "what Metal recommends on this Mac")
    return MemoryBudget(limit, "MLX's limit on this machine")


def mac_memory(memory: str) -> MemoryBudget:
    """Return the memory that training may use on a Mac of the given size, as Metal recommends.

    Args:
        memory: memory size such as `16GB`, `16 GiB` or `16g`; a GB is 2^30 bytes here.

    Raises:
        ConfigError: `memory` is not written in one of these forms.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:g|gb|gib)\s*", memory, re.IGNORECASE)
    size = int(float(match[1]) * GIBIBYTE) if match else 0
    if not size:
        raise ConfigError(f"`memory` must be like 16GB, got `{memory}`")
    is_large = size >= LARGE_MAC_BYTES
    share = LARGE_MAC_SHARE if is_large else RECOMMENDED_SHARE
    words = "three quarters" if is_large else "two thirds"
    description = f"{words} of a Mac's {memory.strip()}, as Metal recommends"
    return MemoryBudget(int(size * share), description)


class BufferLimits(NamedTuple):
    """MLX's limits for freed memory kept for reuse (cache) and for wired memory, in bytes."""

    cache: int  # freed buffers kept for reuse
    wired: int


def buffer_limits(kind: DeviceKind, info: Mapping[str, Any]) -> BufferLimits | None:
    """Return MLX's buffer limits for training on a device; None keeps MLX's defaults.

    Only Metal gets limits.

    Args:
        info: what `mx.device_info` returns for the device.
    """
    recommended = info.get(RECOMMENDED_BYTES_KEY)
    if kind != "metal" or not recommended:
        return None
    return BufferLimits(int(CACHE_SHARE * recommended), int(WIRED_SHARE * recommended))


@contextmanager
def limited_buffers() -> Iterator[BufferLimits | None]:
    """Set MLX's buffer limits for training inside the block and restore them afterwards.

    On the CPU, buffers come from the C library. It is set to keep freed memory, and this setting
    is not undone.
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


# glibc's malloc.h: blocks above M_MMAP_THRESHOLD are mapped one by one; M_TRIM_THRESHOLD bytes
# stay at the end of the heap; the heap grows by M_TOP_PAD.
MALLOC_OPTIONS = {-3: 2**25, -1: 2**31 - 1, -2: 2**28}


def keep_freed_memory() -> bool:
    """Make the C library's malloc reuse freed memory instead of returning it to the system.

    Otherwise each large array gets new memory pages, which costs a page fault per page. Nothing is
    changed if environment variables already configure malloc (`MALLOC_TRIM_THRESHOLD_` and the
    like).

    Returns:
        Whether malloc was configured; only glibc has the option.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(option, size) == 1 for option, size in MALLOC_OPTIONS.items()])
