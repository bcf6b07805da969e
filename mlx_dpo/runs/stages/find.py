"""Find the run that a folder names: its own, or that of the last finished stage."""

import os
from pathlib import Path
from typing import Any

from mlx_dpo.errors import RunError
from mlx_dpo.io.checksums import read_checked_json
from mlx_dpo.io.notices import notify_once
from mlx_dpo.models.files import MODEL_FOLDER
from mlx_dpo.runs.folder import RunPaths, check_finished_files, read_record

STAGES_RECORD = "stages.json"  # in a folder of several stages, each a run in a subfolder


def has_run(folder: str) -> bool:
    """Return whether the folder has a run, or the runs of several stages."""
    path = Path(folder).expanduser()
    return RunPaths(path).record.is_file() or (path / STAGES_RECORD).is_file()


def _find_stage(folder: Path) -> RunPaths | None:
    """Return the paths of the last finished stage in a folder of stages; None for other folders.

    If no stage is finished, it is the one that has begun.

    Raises:
        RunError: no stage has begun.
    """
    if not (folder / STAGES_RECORD).is_file() or os.path.lexists(RunPaths(folder).record):
        return None
    names = [str(name) for name in read_checked_json(folder / STAGES_RECORD)[0]["stages"]]
    begun = [
        (name, record["state"] == "finished")
        for name in names
        if (record := read_record(RunPaths(folder / name))) is not None
    ]
    if not begun:
        raise RunError(
            f"{folder}: no stage has begun; continue with `mlx-dpo train --resume "
            f"--output {folder}`"
        )
    finished = [name for name, is_finished in begun if is_finished]
    name = finished[-1] if finished else begun[0][0]
    if len(finished) < len(names):
        notify_once(
            f"{folder}: using the stage `{name}` ({names.index(name) + 1} of {len(names)}, "
            f"{len(finished)} finished); the last stage is not finished"
        )
    return RunPaths(folder / name)


def run_folder(folder: str) -> Path:
    """Return the folder of the run that a folder names: itself, or its last finished stage.

    Raises:
        RunError: the folder is one of stages, of which none has begun.
    """
    path = Path(folder).expanduser()
    stage = _find_stage(path)
    return path if stage is None else stage.folder


def find_run(folder: str) -> tuple[RunPaths, dict[str, Any]]:
    """Return the paths and the run record (content of `run.json`) of the run in `folder`.

    In a folder of stages this is the run of the last finished stage.

    Raises:
        RunError: the folder is not a run folder.
        DamagedFileError: the run is finished, and one of its files is missing or damaged.
    """
    paths = RunPaths(run_folder(folder))
    record = read_record(paths)
    if record is None:
        why = "no `run.json`" if paths.folder.is_dir() else "no such folder"
        if (paths.folder / "config.json").is_file():
            raise RunError(f"{folder}: {MODEL_FOLDER}")
        raise RunError(f"{folder}: not a run folder ({why}); train one with `mlx-dpo train`")
    if record["state"] == "finished":
        check_finished_files(paths, record)
    return paths, record
