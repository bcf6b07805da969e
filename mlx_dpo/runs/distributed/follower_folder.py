"""The folder that a rank works in: the run folder on rank 0, a temporary one on the others."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple, Protocol

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.distributed import heartbeats
from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.io.atomic import remove_abandoned, temporary_path
from mlx_dpo.runs.distributed.peers import Peers
from mlx_dpo.runs.early_stopping import BestCheckpoint
from mlx_dpo.runs.folder import (
    RunPaths,
    check_replaceable,
    check_resumable,
    check_run_folder,
    lock_folder,
    read_record,
)
from mlx_dpo.runs.trackers import check_trackers
from mlx_dpo.training import checkpoint

NAME = "rank"  # last part of the names of temporary folders


class StartedRun(Protocol):
    """What of a `DPOTrainer` the functions of this module read."""

    config: DPOConfig
    peers: Peers
    paths: RunPaths
    resume: bool
    overwrite: bool


class OpenedFolder(NamedTuple):
    """The folder that a rank works in, and the record of the run to be resumed, if any."""

    paths: RunPaths
    record: dict[str, Any] | None


@contextmanager
def open_run_folder(run: StartedRun) -> Iterator[OpenedFolder]:
    """Lock the run folder on rank 0; create a temporary one on others, removed after the block.

    Other ranks write their metrics and their record there, and rank 0 sends them what they need of
    the run folder. So they take the same decisions by the same code.

    Raises:
        ConfigError: a tracker cannot be used.
        RunError: the folder is in use, cannot be written, or has another run.
        SharedError: rank 0 has raised an error.
    """
    ranks, record = run.peers.ranks, None
    with ExitStack() as stack:
        with run.peers.sharing_errors():
            if ranks.is_main:
                paths = run.paths
                check_trackers(run.config)
                check_run_folder(paths)
                stack.enter_context(lock_folder(paths))
                record = _find_record(run)
            else:
                paths = RunPaths(stack.enter_context(_temporary_folder()))
        yield OpenedFolder(paths, ranks.broadcast_json("run.json", record))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Create a folder that is removed after the block; remove those of ranks that were killed."""
    parent = Path(gettempdir())
    remove_abandoned(parent, NAME)
    with temporary_path(parent / NAME) as folder:
        folder.mkdir(mode=0o700)
        yield folder


def _find_record(run: StartedRun) -> dict[str, Any] | None:
    """Return the record of the run to be resumed; None for a new run.

    Raises:
        RunError: the run in the folder cannot be resumed, or not be replaced.
    """
    if run.overwrite:
        check_replaceable(run.paths)  # the run is removed when this one can begin
        return None
    record = read_record(run.paths)
    if record is not None:
        config = run.config.with_recorded_choices(record["settings"])
        check_resumable(run.paths, record, config, resume=run.resume)
    return record


def find_checkpoint(ranks: Ranks, paths: RunPaths, best: BestCheckpoint) -> Path | None:
    """Return the last undamaged checkpoint of rank 0, copied to the folder of each rank.

    The metrics up to there are copied as well. The result is None if there is no checkpoint.
    """
    last = None
    if ranks.is_main:
        last = checkpoint.latest_undamaged(paths.checkpoints, best.check_resumable)
        heartbeats.note(checkpoint=None if last is None else str(last))
    send_file(ranks, paths.metrics)
    return send_folder(ranks, last, paths.checkpoints)


def send_file(ranks: Ranks, path: Path) -> None:
    """Write a file of the run folder, if it exists, to the same place in the others' folders."""
    if ranks.is_alone:
        return
    has_file = ranks.broadcast_json("a file of the run folder", path.is_file())
    content = ranks.broadcast_bytes(
        path.name, path.read_bytes() if has_file and ranks.is_main else None
    )
    if has_file and not ranks.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def send_folder(ranks: Ranks, folder: Path | None, parent: Path) -> Path | None:
    """Copy a folder of rank 0's run folder to the others; return the folder of this rank.

    Args:
        folder: the folder on rank 0, or None; other ranks pass None.
        parent: where the folder is on this rank.
    """
    if ranks.is_alone:
        return folder
    files = sorted(path.name for path in folder.iterdir()) if folder is not None else []
    name: Any
    name, files = ranks.broadcast_json(
        "a folder of the run folder", [folder and folder.name, files]
    )
    if name is None:
        return None
    target = parent / os.path.basename(name)
    for file in files:
        send_file(ranks, target / os.path.basename(file))
    return target
