"""Give MLX a private folder for the kernels that it compiles at run time.

MLX's CPU backend compiles kernels with the system's compiler, stores them as shared libraries in
`mlx/VERSION/cpu` below the folder of temporary files, and loads a library that it finds there by
its name. (The CUDA backend stores its PTX code in the same way.) Below `/tmp`, the user who creates
this folder first can put code there that runs with the rights of everyone who uses MLX later.

MLX looks TMPDIR up each time it needs a new kernel. The variable is therefore set, but only for the
C code of this process: `os.environ` and Python's `tempfile` keep the user's own folder.
"""

import atexit
import ctypes
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

FOLDER = "jit"  # below the cache folder; MLX appends `mlx/VERSION/cpu`
PRIVATE = 0o700
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

_folder: Path | None = None


def use_private_jit_cache(cache_folder: Path | None, rank: int = 0) -> Path | None:
    """Make MLX compile and load kernels in a folder that only this user can write to.

    The folder is `jit`, or `jit-rank-N`, in `cache_folder`. If it cannot be used, a temporary
    folder is used that is removed when the process ends. If there is none either, MLX compiles no
    kernels.

    Args:
        cache_folder: Folder of the user's caches; None if the user has none.
        rank: Number of this process among those of a run. Each has a folder of its own, because
            MLX may load a library that another process has written only half of.

    Returns:
        The folder, or None if MLX compiles no kernels.
    """
    global _folder
    if not hasattr(os, "geteuid"):  # Windows, where each user has a folder of temporary files
        return None
    if _folder is None or not is_private(_folder):
        name = f"{FOLDER}-rank-{rank}" if rank else FOLDER
        _folder = _persistent_folder(cache_folder, name) or _temporary_folder()
    if _folder is None:
        _disable_compilation()
    else:
        ctypes.CDLL(None).setenv(b"TMPDIR", os.fsencode(_folder), 1)  # not in `os.environ`
    return _folder


def user_environment() -> dict[str, str]:
    """Return the environment for other programs, with the user's own TMPDIR."""
    return dict(os.environ)


def is_private(folder: Path) -> bool:
    """Return whether only this user can change what `folder` contains.

    The folder has to be a real folder (no symbolic link) of this user with mode 0700, and no
    other user may be able to replace it or a folder above it.
    """
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        if stat.S_IMODE(status.st_mode) != PRIVATE:
            return False
        return all(_is_trusted(parent) for parent in folder.resolve(strict=True).parents)
    except (OSError, RuntimeError):  # it is gone, or its links form a circle
        return False


def _is_trusted(folder: Path) -> bool:
    """Return whether only this user and root can rename the entries of `folder`."""
    status = folder.stat()
    if status.st_uid not in (0, os.geteuid()):
        return False
    # With the sticky bit (as `/tmp` has), an entry can be renamed by its owner only. Write access
    # of the user's own primary group is common where each user has a group of its own.
    others = OTHERS_WRITE if status.st_gid != os.getegid() else stat.S_IWOTH
    return not status.st_mode & others or bool(status.st_mode & stat.S_ISVTX)


def _persistent_folder(cache_folder: Path | None, name: str) -> Path | None:
    if cache_folder is None:
        return None
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        folder = cache_folder.resolve(strict=True) / name  # links above it are followed only now
        folder.mkdir(mode=PRIVATE, exist_ok=True)
        _restrict(folder)
        usable = is_private(folder) and os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # read-only, full, a file of that name, a circle of links
        return None
    return folder if usable else None


def _restrict(folder: Path) -> None:
    """Give a folder of this user the mode 0700; empty it if others could write to it before."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return
    if status.st_mode & OTHERS_WRITE:
        shutil.rmtree(folder)
        folder.mkdir(mode=PRIVATE)
    elif stat.S_IMODE(status.st_mode) != PRIVATE:
        folder.chmod(PRIVATE)


def _temporary_folder() -> Path | None:
    try:
        folder = Path(tempfile.mkdtemp(prefix="mlx-dpo-jit-")).resolve(strict=True)
    except OSError:  # there is no folder of temporary files either
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder if is_private(folder) else None


def _disable_compilation() -> None:
    """Make MLX run all operations one by one, with the kernels that it comes with."""
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].disable_compile()
    else:
        os.environ["MLX_DISABLE_COMPILE"] = "1"
