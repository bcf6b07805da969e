"""Save and restore checkpoints of a run. A checkpoint folder is complete or does not exist."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from mlx_dpo.adapters.adapter_files import WEIGHTS, load_adapter_weights, save_adapter
from mlx_dpo.errors import RunError, reason
from mlx_dpo.io.arrays import Arrays, named_arrays, random_state, read_arrays, write_arrays
from mlx_dpo.io.atomic import atomic_folder, remove_abandoned
from mlx_dpo.training.loop import Progress
from mlx_dpo.training.synced_reference import SyncedReference

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
SYNCED_REFERENCE = "reference.safetensors"  # weights of an updated synced reference


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
) -> Path:
    """Write a checkpoint atomically and return its folder.

    A checkpoint contains the adapters, the optimizer state, MLX's random state and the progress.
    It also contains the weights of a synced reference that was updated at least once.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    target = checkpoint_path(folder, progress.step)
    with whole_folder(target) as partial:
        save_adapter(partial, policy, adapter_config)
        state = named_arrays(optimizer.state) | {"random": random_state()}
        write_arrays(partial / OPTIMIZER, state)
        if synced is not None and synced.was_updated:
            write_arrays(partial / SYNCED_REFERENCE, synced.weights)
        position = {"step": progress.step, "num_tokens": progress.num_tokens}
        (partial / STATE).write_text(json.dumps(position) + "\n")
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
            f"{target}: cannot be written ({reason(error)}); earlier checkpoints are kept"
        ) from error


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in the folder, in ascending order."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def latest(folder: Path) -> Path | None:
    """Return the folder of the checkpoint with the highest step; None if there is no checkpoint."""
    return max(folder.glob("step-*"), default=None)


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep`, and also temporary files left by a crash."""
    for path in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    remove_abandoned(folder)


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
        RunError: a file is missing or damaged.
        ModelError: the adapters belong to another model.
    """
    try:
        position = json.loads((folder / STATE).read_text())
        state, _ = read_arrays(folder / OPTIMIZER)
        progress = Progress(step=position["step"], num_tokens=position["num_tokens"])
        random_state()[:] = state.pop("random")
        if synced is not None and (folder / SYNCED_REFERENCE).is_file():
            synced.restore(read_arrays(folder / SYNCED_REFERENCE)[0])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RunError(
            f"{folder}: the checkpoint cannot be read ({reason(error)}); remove it to resume "
            "from the one before"
        ) from error
    load_adapter_weights(policy, folder / WEIGHTS)
    optimizer.state = tree_unflatten(list(state.items()))
    return progress


def synced_reference_weights(folder: Path) -> Arrays | None:
    """Return the weights of the synced reference in the last checkpoint, by name.

    The result is None if there is no checkpoint, or if it contains no such weights because the
    reference had not been updated yet.
    """
    last = latest(folder)
    return (
        read_arrays(last / SYNCED_REFERENCE)[0]
        if last and (last / SYNCED_REFERENCE).is_file()
        else None
    )
