"""Load OpenBLAS for MLX's CPU backend on Linux, before MLX is imported.

MLX's wheel for Linux links the reference BLAS, which is 20 to 40 times slower in float32. If
OpenBLAS is loaded first, with global symbols, the dynamic linker uses it for MLX's matrix products.
On macOS, where MLX computes on Metal, nothing is loaded.
"""

import ctypes
import os
import sys

LIBRARY = "libopenblas.so.0"  # Debian and Ubuntu: package libopenblas0-pthread

_loaded: ctypes.CDLL | None = None


def use_openblas() -> bool:
    """Load OpenBLAS if it is installed; return whether MLX's matrix products will use it.

    `MLX_DPO_OPENBLAS=0` keeps the BLAS of MLX's wheel. If MLX was imported before this package, its
    symbols are bound already and nothing is loaded.
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


def num_threads() -> int:
    """Return the number of threads that OpenBLAS uses; 0 if it is not loaded."""
    return 0 if _loaded is None else int(_loaded.openblas_get_num_threads())


def version() -> str:
    """Return the version of OpenBLAS; "" if it is not loaded."""
    if _loaded is None:
        return ""
    # The text begins with `OpenBLAS 0.3.21`.
    _loaded.openblas_get_config.restype = ctypes.c_char_p
    words = _loaded.openblas_get_config().decode(errors="replace").split()
    return words[1] if len(words) > 1 else "of unknown version"


def set_num_threads(count: int) -> None:
    """Set the number of threads that OpenBLAS uses in this process, if it is loaded."""
    if _loaded is not None:
        _loaded.openblas_set_num_threads(count)
