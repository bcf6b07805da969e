"""Save and restore checkpoints of a run. A checkpoint folder is complete or does not exist."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from mlx_dpo.adapters.adapter_files import WEIGHTS, load_adapter_weights, save_adapter
from mlx_dpo.errors import DamagedFileError, RunError, reason
from mlx_dpo.io.arrays import Arrays, named_arrays, random_state
from mlx_dpo.io.atomic import atomic_folder, remove_abandoned
from mlx_dpo.io.checksums import (
    NOT_FOUND,
    damaged,
    read_checked_arrays,
    read_checked_json,
    to_checked_json,
    verify_file,
    write_checked_arrays,
)
from mlx_dpo.io.notices import notify
from mlx_dpo.training.loop import Progress
from mlx_dpo.training.synced_reference import SyncedReference

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
SYNCED_REFERENCE = "reference.safetensors"  # weights of an updated synced reference
FOLDER_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class CheckpointState:
    """Content of a checkpoint's `state.json`: the progress, and what belongs to the checkpoint."""

    progress: Progress
    num_metrics_rows: int = 0  # rows of the run's metrics up to this step
    files: dict[str, str] = field(default_factory=dict)  # checksum of each other file, by name


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step` inside the checkpoints folder."""
    return folder / f"step-{step:06d}"


def save(
    folder: Path,
    policy: nn.Module,
    optimizer: optim.Optimizer,
    progress: Progress,
    adapter_config: dict[str, Any],
    synced: SyncedReference | None = None,
    num_metrics_rows: int = 0,
) -> Path:
    """Write a checkpoint atomically and return its folder.

    A checkpoint contains the adapters, the optimizer state, MLX's random state, the progress, and
    the checksums of its files. It also contains the weights of a synced reference that was updated
    at least once.

    Args:
        num_metrics_rows: Number of rows in the run's metrics up to this step.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    target = checkpoint_path(folder, progress.step)
    with whole_folder(target) as partial:
        save_adapter(partial, policy, adapter_config)
        state = named_arrays(optimizer.state) | {"random": random_state()}
        # In one order, which a restored state does not have: a resumed run writes the same bytes.
        write_checked_arrays(partial / OPTIMIZER, dict(sorted(state.items())))
        if synced is not None and synced.was_updated:
            write_checked_arrays(partial / SYNCED_REFERENCE, dict(sorted(synced.weights.items())))
        position = {
            "step": progress.step,
            "num_tokens": progress.num_tokens,
            "num_metrics_rows": num_metrics_rows,
            "files": {file.name: verify_file(file) for file in sorted(partial.iterdir())},
        }
        (partial / STATE).write_text(to_checked_json(position))
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Create a temporary folder for the block; it replaces the folder `target` at the block's end.

    All files are flushed to disk before the replacement.

    Yields:
        The path of the temporary folder.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    try:
        # A folder of this step is left over if the run was resumed from an earlier one.
        with atomic_folder(target, durable=True, overwrite=True) as partial:
            yield partial
    except OSError as error:
        raise RunError(
            f"{target}: cannot be written ({reason(error)}); earlier checkpoints remain"
        ) from error


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in the folder, in ascending order."""
    matches = (FOLDER_NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def latest(folder: Path) -> Path | None:
    """Return the folder of the checkpoint with the highest step; None if there is no checkpoint."""
    steps = saved_steps(folder)
    return checkpoint_path(folder, steps[-1]) if steps else None


def latest_undamaged(
    folder: Path, check_rest: Callable[[CheckpointState], None] = lambda state: None
) -> Path | None:
    """Return the newest checkpoint without damage; None if there is none.

    Newer checkpoints are removed, because the steps after the returned one will be taken again.
    A notice names what is damaged and where the run resumes.

    Args:
        check_rest: raises `DamagedFileError` if another file is damaged that a run needs to be
            resumed from this state.
    """
    faults: dict[Path, str] = {}
    whole = None
    for step in reversed(saved_steps(folder)):
        try:
            check_rest(read_state(checkpoint_path(folder, step)))
        except DamagedFileError as error:
            faults[checkpoint_path(folder, step)] = error.fault
        else:
            whole = checkpoint_path(folder, step)
            break
    for path, fault in faults.items():
        notify(f"{fault}; resuming from {whole.name if whole else 'the beginning'}")
        shutil.rmtree(path, ignore_errors=True)
    return whole


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep`, and also temporary files left by a crash."""
    for step in saved_steps(folder)[:-keep]:
        shutil.rmtree(checkpoint_path(folder, step), ignore_errors=True)
    remove_abandoned(folder)


def read_state(folder: Path) -> CheckpointState:
    """Return the state of a checkpoint, after verifying the checksums of all its files.

    Raises:
        DamagedFileError: a file is missing or damaged.
    """
    position, stored = read_checked_json(folder / STATE)
    try:
        progress = Progress(step=int(position["step"]), num_tokens=int(position["num_tokens"]))
        state = CheckpointState(
            progress, int(position.get("num_metrics_rows", 0)), dict(position.get("files", {}))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / STATE, "not the state of a checkpoint") from error
    for name, digest in state.files.items():
        verify_file(folder / name, expected=digest)
    if stored is None:  # of an earlier version, which stored no checksums
        for name in (WEIGHTS, OPTIMIZER):
            verify_file(folder / name)
    return state


def restore(
    folder: Path,
    policy: nn.Module,
    optimizer: optim.Optimizer,
    synced: SyncedReference | None = None,
) -> Progress:
    """Restore policy, optimizer, synced reference and MLX's random state from a checkpoint.

    Returns:
        The progress of the run at the checkpoint.

    Raises:
        DamagedFileError: a file is missing or damaged.
        ModelError: the adapters belong to another model.
    """
    progress = read_state(folder).progress
    state = _read_arrays(folder / OPTIMIZER)
    try:
        random_state()[:] = state.pop("random")
    except (KeyError, ValueError) as error:
        raise damaged(folder / OPTIMIZER, "it has no random state") from error
    if synced is not None and (folder / SYNCED_REFERENCE).is_file():
        synced.restore(_read_arrays(folder / SYNCED_REFERENCE))
    load_adapter_weights(policy, folder / WEIGHTS)
    optimizer.state = tree_unflatten(list(state.items()))
    return progress


def _read_arrays(path: Path) -> Arrays:
    try:
        return read_checked_arrays(path)[0]
    except FileNotFoundError:
        raise damaged(path, NOT_FOUND) from None
    except RuntimeError as error:
        raise damaged(path, reason(error)) from error


def synced_reference_weights(folder: Path) -> Arrays | None:
    """Return the weights of the synced reference in the last checkpoint, by name.

    The result is None if there is no checkpoint, or if it contains no such weights because the
    reference had not been updated yet.

    Raises:
        DamagedFileError: a file of the checkpoint is missing or damaged.
    """
    if (last := latest(folder)) is None:
        return None
    read_state(last)
    path = last / SYNCED_REFERENCE
    return _read_arrays(path) if path.is_file() else None
