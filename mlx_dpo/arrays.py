"""MLX's trees, files and random state, with the types that its own signatures leave open."""

import errno
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

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
