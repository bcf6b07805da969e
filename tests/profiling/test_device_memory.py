"""Available memory, MLX's buffer limits, and reuse of freed memory."""

import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.profiling import device_memory
from mlx_dpo.profiling.device_memory import (
    RECOMMENDED_BYTES_KEY,
    available_memory,
    buffer_limits,
    mac_memory,
)


# What llama.cpp logs as `recommendedMaxWorkingSetSize` on such Macs, in MiB.
@pytest.mark.parametrize(
    ("memory", "mebibytes"),
    [("16GB", 10922.67), ("32 GB", 21845.33), ("64GiB", 49152.0), ("96g", 73728.0)],
)
def test_the_budget_of_a_mac_equals_metal_s_recommendation(memory, mebibytes):
    assert mac_memory(memory).bytes == pytest.approx(mebibytes * 2**20, rel=1e-6)
    assert memory in mac_memory(memory).description


@pytest.mark.parametrize("memory", ["16", "0GB", "-8GB", "16 TB", "much", "1e3GB", ""])
def test_invalid_amounts_of_memory_are_rejected(memory):
    with pytest.raises(ConfigError, match="`memory` must be like 16GB"):
        mac_memory(memory)


def test_a_memory_limit_is_the_available_memory():
    before = mx.set_memory_limit(123_000_000)
    try:
        assert available_memory().bytes == 123_000_000
    finally:
        mx.set_memory_limit(before)


def test_metal_caches_a_quarter_and_wires_half():
    assert buffer_limits("metal", {RECOMMENDED_BYTES_KEY: 12_000_000_000}) == (
        3_000_000_000,
        6_000_000_000,
    )


@pytest.mark.parametrize(("kind", "info"), [("cpu", {}), ("cuda", {}), ("metal", {})])
def test_other_devices_keep_mlx_s_limits(kind, info):
    assert buffer_limits(kind, info) is None


def test_limits_are_set_inside_the_block_and_restored(monkeypatch):
    monkeypatch.setattr(device_memory, "device_kind", lambda: "metal")
    monkeypatch.setattr(device_memory, "is_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda device: {RECOMMENDED_BYTES_KEY: 80_000_000})
    before = mx.set_cache_limit(7_000_000)
    try:
        with pytest.raises(KeyError), device_memory.limited_buffers():
            assert mx.set_cache_limit(20_000_000) == 20_000_000
            raise KeyError
        assert mx.set_cache_limit(7_000_000) == 7_000_000
    finally:
        mx.set_cache_limit(before)


# Blocks above glibc's own threshold, freed one by one: without the setting each is mapped anew.
PROGRAM = """
import ctypes, resource, sys
from mlx_dpo.profiling.device_memory import keep_freed_memory
print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.free.argtypes = (ctypes.c_void_p,)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in range(20, 30):
        blocks = [libc.malloc(size << 20) for _ in range(2)]
        for block in blocks:
            libc.memset(block, 1, size << 20)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def run(**env):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=env
    )
    is_set, faults = done.stdout.split()
    return is_set, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_reused():
    is_set, faults = run()
    is_overridden, others = run(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert (is_set, is_overridden) == ("True", "False")
    assert faults < others / 20
