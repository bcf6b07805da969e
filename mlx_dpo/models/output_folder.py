"""Check and create the folder that a model or an adapter is written to."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.atomic import atomic_folder, other_writer
from mlx_dpo.io.write_errors import advice_on, find_write_error
from mlx_dpo.units import format_bytes

SPARE = 1.05  # for the tokenizer, the configuration and the file system, next to the weights


def check_output_folder(output: Path, expected_bytes: int) -> None:
    """Raise `ModelError` if `output` is a file or not empty, cannot be written, or lacks space.

    Args:
        expected_bytes: Approximate size of the weights that will be written.
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
            f"{output}: needs about {format_bytes(expected_bytes)} and the disk has "
            f"{format_bytes(free)} left; free some space, or name a folder on another disk"
        )


@contextmanager
def new_output_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to; rename it to `output` if the `with` block succeeds.

    Raises:
        ModelError: another process is writing to `output`, or the folder cannot be made.
    """
    final = output.resolve()
    if (process := other_writer(final)) is not None:
        raise ModelError(
            f"{output}: process {process} is writing to it; wait for it, or name another folder"
        )
    with ExitStack() as stack:
        with disk_errors(output):
            folder = stack.enter_context(atomic_folder(final))
        yield folder
        with disk_errors(output):
            stack.close()


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Convert errors of writing to `output` inside the `with` block to `ModelError`.

    MLX reports a failed write as a RuntimeError; other RuntimeErrors are not converted.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("[write]"):
            raise
        failed = error if isinstance(error, OSError) else find_write_error(output, str(error))
        raise ModelError(
            f"{output}: cannot be written ({reason(failed)}); {advice_on(failed)}"
        ) from error


def _nearest_folder(path: Path) -> Path:
    """Return `path` if it is a folder, otherwise the nearest parent folder that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
