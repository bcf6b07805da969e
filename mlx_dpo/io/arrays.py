"""Typed access to MLX's parameter trees, safetensors files and random state."""

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dpo.io.write_errors import find_write_error

Arrays = dict[str, mx.array]


def named_arrays(tree: Any) -> Arrays:
    """Return the arrays of a nested parameter tree, keyed by dotted path such as `a.0.weight`."""
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(tree)))


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Read the arrays and the metadata of a safetensors file.

    Raises:
        RuntimeError: the file is missing or is not a safetensors file.
    """
    try:
        return cast("tuple[Arrays, dict[str, str]]", mx.load(str(path), return_metadata=True))
    except UnicodeDecodeError as error:  # in its metadata or the names of its arrays
        raise RuntimeError(f"its header is not UTF-8 ({error.reason})") from error


def write_arrays(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> None:
    """Write arrays and metadata to a safetensors file.

    Raises:
        OSError: the file cannot be written; MLX itself would raise a RuntimeError.
    """
    try:
        mx.save_safetensors(str(path), arrays, metadata or {})
    except RuntimeError as error:  # MLX's only sign of a failed write, without an error number
        raise find_write_error(path, str(error)) from error


def scalar(array: mx.array) -> float:
    """Evaluate an array with one element, and return its value as a Python number."""
    return cast("float", array.item())


def random_state() -> mx.array:
    """Return MLX's random state; assigning to its elements restores a saved state. (2,) uint32"""
    return cast("list[mx.array]", mx.random.state)[0]
