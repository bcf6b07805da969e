"""MLX's trees, files and random state, with the types that its own signatures leave open."""

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dpo.errors import ModelError

Arrays = dict[str, mx.array]


def flat(tree: Any) -> Arrays:
    """The arrays of a tree by dotted name."""
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(tree)))


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata of a safetensors file; RuntimeError if it is none."""
    return cast("tuple[Arrays, dict[str, str]]", mx.load(str(path), return_metadata=True))


def write_arrays(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; OSError where it cannot be written, as Python's own files raise."""
    try:
        mx.save_safetensors(str(path), arrays, metadata or {})
    except RuntimeError as error:  # all that MLX says of a full disk, without a number
        raise OSError(errno.ENOSPC, "the disk refused it; is it full?", str(path)) from error


def scalar(array: mx.array) -> float:
    """The value of an array of one element; waits for it. ()"""
    return cast("float", array.item())


def random_state() -> mx.array:
    """MLX's random state itself: assigning to its elements restores one. (2,) uint32"""
    return cast("list[mx.array]", mx.random.state)[0]


SPARE = 1.05  # tokenizer, configuration and the file system's own need, beside the weights


def check_target(output: Path, expected_bytes: int) -> None:
    """Refuse a target that is taken, cannot be written, or has no room for `expected_bytes`.

    Raises:
        ModelError: one of these.
    """
    if output.exists() and not output.is_dir():
        raise ModelError(f"{output}: is a file; name a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()):
        raise ModelError(f"{output}: is not empty; name a folder that does not exist yet")
    parent = _nearest_folder(output.resolve().parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ModelError(f"{output}: `{parent}` cannot be written to; name another folder")
    free = shutil.disk_usage(parent).free
    if free < expected_bytes * SPARE:
        raise ModelError(
            f"{output}: needs about {megabytes(expected_bytes)} and the disk has "
            f"{megabytes(free)} left; free some space, or name a folder on another disk"
        )


def megabytes(size: float) -> str:
    """`1.5 GB`, `350 MB` or `0.4 MB`, in powers of ten as disks are sold."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A path beside `output` to write to; it becomes `output` if the block ends well.

    It does not exist at first, and is gone if the block fails or is interrupted.

    Raises:
        ModelError: another process is writing to `output`, or the disk refuses.
    """
    final = output.resolve()
    _clear_stale(final, output)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        with writing(output):
            final.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with writing(output):
            os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn a refusal of the disk into one line; MLX reports its own as a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("[write]"):
            raise
        said = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        raise ModelError(
            f"{output}: cannot be written ({said}); see whether the disk is full, "
            "or name another folder"
        ) from error


def _nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _clear_stale(final: Path, output: Path) -> None:
    """Remove what dead processes left beside `final`; refuse while a living one writes."""
    for left in final.parent.glob(f".{glob.escape(final.name)}.partial-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and int(pid) != os.getpid() and _alive(int(pid)):
            raise ModelError(
                f"{output}: process {pid} is writing it at this moment; wait for it, "
                "or name another folder"
            )
        shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True
