"""OpenBLAS for MLX's CPU backend on Linux: found if installed, loaded before MLX.

The wheel of MLX for Linux links the reference BLAS, some forty times slower in float32.
Loading OpenBLAS with global symbols first makes the dynamic linker bind MLX's matrix
products to it. On macOS MLX computes on Metal and nothing is done.
"""

import ctypes
import os
import sys

LIBRARY = "libopenblas.so.0"  # Debian and Ubuntu: package libopenblas0-pthread

_loaded: ctypes.CDLL | None = None


def use_openblas() -> bool:
    """Load OpenBLAS unless told not to; True if MLX's matrix products will use it.

    `MLX_DPO_OPENBLAS=0` leaves the wheel's own BLAS in place. Without effect, and False,
    where MLX was imported before this package: its symbols are bound already.
    """
    global _loaded
    if _loaded is not None:
        return True
    if sys.platform != "linux" or os.environ.get("MLX_DPO_OPENBLAS") == "0":
        return False
    if "mlx.core" in sys.modules:
        return False
    try:
        _loaded = ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:  # not installed: the wheel's BLAS computes the same, slower
        return False
    return True
