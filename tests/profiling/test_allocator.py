"""Freed memory that stays with the process: seen from a process of its own."""

import subprocess
import sys

import pytest

# Blocks above glibc's own threshold, freed one by one: without the setting each is mapped anew.
PROGRAM = """
import ctypes, resource, sys
from mlx_dpo.profiling.memory import keep_freed_memory
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
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_handed_out_again():
    kept, faults = run()
    asked, others = run(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert (kept, asked) == ("True", "False")
    assert faults < others / 20
