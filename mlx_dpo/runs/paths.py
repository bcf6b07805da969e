"""A run folder: where everything in it lies, who may write to it, and what `run.json` says."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dpo.config import DPOConfig
from mlx_dpo.errors import RunError

PARTIAL_RECORD = "partial-run.json"


@dataclass(frozen=True)
class RunPaths:
    """The files of a run; the adapters lie in `folder` itself, where mlx-lm looks for them."""

    folder: Path

    @property
    def record(self) -> Path:
        """Settings, provenance, counts and results."""
        return self.folder / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per step or evaluation."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        """One folder per evaluation that may turn out to be the best; gone when it is over."""
        return self.folder / "best"

    @property
    def lock(self) -> Path:
        """Held by the process that trains into this folder."""
        return self.folder / ".lock"

    def reference(self, split: str) -> Path:
        """Reference log-probabilities of `train` or `valid`, in the order of the pairs."""
        return self.folder / "reference" / f"{split}.safetensors"


def write_record(paths: RunPaths, record: dict[str, Any]) -> None:
    """Replace `run.json` by another whole one."""
    partial = paths.record.with_name(PARTIAL_RECORD)
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, paths.record)


def read_record(paths: RunPaths) -> dict[str, Any] | None:
    """What `run.json` says, or None where there is none.

    Raises:
        RunError: it cannot be read as the record of a run.
    """
    try:
        record = json.loads(paths.record.read_text())
        DPOConfig.from_dict(record["settings"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{paths.record}: not the record of a run ({error})") from error
    return dict(record)


def known_run(folder: str) -> tuple[RunPaths, dict[str, Any]]:
    """The files of a run that was begun, and its record.

    Raises:
        RunError: the folder is no run folder.
    """
    paths = RunPaths(Path(folder).expanduser())
    record = read_record(paths)
    if record is None:
        there = "no `run.json` in it" if paths.folder.is_dir() else "no such folder"
        if (paths.folder / "config.json").is_file():
            raise RunError(f"{folder}: a model, not a run folder; name models by `--model`")
        raise RunError(f"{folder}: not a run folder ({there}); train one with `mlx-dpo train`")
    return paths, record


def refuse_foreign_folder(paths: RunPaths) -> None:
    """Leave folders alone that hold something else.

    Raises:
        RunError: names a file that no run wrote.
    """
    if paths.record.is_file() or not paths.folder.is_dir():
        return
    ours = {paths.lock.name, PARTIAL_RECORD}  # what a run that was killed at once leaves
    others = {path.name for path in paths.folder.iterdir()} - ours
    if others:
        raise RunError(
            f"{paths.folder}: not empty and not a run folder (found `{min(others)}`); "
            "choose another --output"
        )


@contextmanager
def claimed(paths: RunPaths) -> Iterator[None]:
    """Hold the folder for this process; a folder that nothing was written into disappears again.

    The lock belongs to the open file, so that the system releases it whatever ends the process.

    Raises:
        RunError: another process holds it, or it cannot be written.
    """
    try:
        paths.folder.mkdir(parents=True, exist_ok=True)
        handle = paths.lock.open("w")
    except OSError as error:
        raise RunError(
            f"{paths.folder}: cannot be written ({error.strerror}); choose another --output"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{paths.folder}: another run is writing here; wait for it or choose "
                "another --output"
            ) from None
        try:
            yield
        finally:
            if [path.name for path in paths.folder.iterdir()] == [paths.lock.name]:
                paths.lock.unlink()
                paths.folder.rmdir()
