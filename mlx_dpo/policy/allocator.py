"""The C library's memory on Linux, from which MLX's CPU backend takes its arrays.

By default large arrays go back to the system when they are freed, and the next one is zeroed
page by page: a tenth of a training step.
"""

import ctypes
import os
import sys

# What malloc.h of glibc calls M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD: only larger
# blocks than this are mapped one by one, so many bytes stay at the heap's end, and it grows so.
KEPT = {-3: 2**25, -1: 2**31 - 1, -2: 2**28}


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
    return all([mallopt(what, size) == 1 for what, size in KEPT.items()])
