"""A run folder: where everything in it lies, who may write to it, and what `run.json` says."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Any

from mlx_dpo.adapters.files import adapter_digest
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import RunError
from mlx_dpo.io.atomic import is_temporary, write_file
from mlx_dpo.runs.inputs import Inputs


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
    write_file(paths.record, json.dumps(record, indent=2) + "\n")


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


def find_run(folder: str) -> tuple[RunPaths, dict[str, Any]]:
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


def check_run_folder(paths: RunPaths) -> None:
    """Leave folders alone that hold something else.

    Raises:
        RunError: names a file that no run wrote.
    """
    if paths.record.is_file() or not paths.folder.is_dir():
        return
    # A run that was killed at once leaves its lock and a temporary file.
    others = {path.name for path in paths.folder.iterdir() if not is_temporary(path)}
    others.discard(paths.lock.name)
    if others:
        raise RunError(
            f"{paths.folder}: not empty and not a run folder (found `{min(others)}`); "
            "choose another --output"
        )


@contextmanager
def lock_folder(paths: RunPaths) -> Iterator[None]:
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


SCORER_VERSION = 2  # to be raised when the same pairs get other log-probabilities than before

PROVENANCE_NAMES = {
    "model": "the model",
    "tokenizer": "the tokenizer",
    "held": "the device, or the number type of the weights on it,",
    "train": "the training pairs",
    "valid": "the held-out pairs",
    "start": "the start adapter",
    "reference": "the reference model",
}


def start_adapter_provenance(config: DPOConfig) -> dict[str, Any]:
    """The adapter that a run starts from, by content; nothing if it starts from none.

    Raises:
        ModelError: there is none where the settings say.
    """
    folder = config.start_adapter
    return {} if folder is None else {"start": adapter_digest(Path(folder))}


def new_record(
    config: DPOConfig,
    inputs: Inputs,
    start: dict[str, Any],
    earlier: Mapping[str, Any] | None = None,
    *,
    total_steps: int,
) -> dict[str, Any]:
    """The record of a run that is about to begin; `start` as `start_provenance` says.

    A run that goes on keeps the id of its `earlier` record.
    """
    return {
        "id": (earlier or {}).get("id") or token_hex(8),
        "state": "unfinished",
        "steps": total_steps,
        "settings": config.to_dict(),
        "provenance": inputs.provenance(config) | start,
        "counts": {"train": len(inputs.train), "valid": len(inputs.valid)},
        "pairs": [report.to_dict() for report in inputs.reports],
        # From the run folder, so that the run opens from any current folder.
        "model_folder": _relative(config.model, config.output),
        "reference_folder": config.reference_model
        and _relative(config.reference_model, config.output),
        "start_folder": config.start_adapter and _relative(config.start_adapter, config.output),
        "versions": {name: version(name) for name in ("mlx-dpo", "mlx", "mlx-lm")},
        "evaluation": None,
        "kept": None,
        "stopped_early_at": None,
        "warnings": [],
    }


def hub_model_id(record: Mapping[str, Any]) -> str | None:
    """The Hub id of the model that a run is trained on; None for a folder, whose path would mean
    nothing elsewhere.
    """
    return None if record["model_folder"] else str(record["settings"]["model"])


def _relative(model: str, output: str) -> str | None:
    folder = Path(model).expanduser()
    return os.path.relpath(folder, output) if folder.is_dir() else None


def check_resumable(
    paths: RunPaths, earlier: dict[str, Any], config: DPOConfig, *, resume: bool
) -> None:
    """Refuse to write over a run, or to go on with one under settings of another result.

    Raises:
        RunError: says what the folder holds, or names the first setting that differs.
    """
    if earlier["state"] == "finished":
        steps = earlier.get("stopped_early_at") or earlier["steps"]
        raise RunError(
            f"{paths.folder}: this run is finished after {steps} steps; choose another --output"
        )
    if not resume:
        raise RunError(
            f"{paths.folder}: holds an unfinished run; add --resume to go on with it, or choose "
            "another --output"
        )
    before = DPOConfig.from_dict(earlier["settings"])
    if (name := before.find_difference(config)) is not None:
        raise RunError(
            f"{paths.folder}: the run began with {name} = {_shown(getattr(before, name))}, not "
            f"{_shown(getattr(config, name))}; resume with the same settings, or choose another "
            "--output"
        )


def _shown(value: Any) -> str:
    return "its default" if value is None else repr(value)


def check_provenance(paths: RunPaths, earlier: dict[str, Any], now: Mapping[str, str]) -> None:
    """Refuse to go on where something that the run depends on is not what it was.

    Raises:
        RunError: names what changed.
    """
    for name, content in now.items():
        if earlier["provenance"][name] != content:
            raise RunError(
                f"{paths.folder}: {PROVENANCE_NAMES[name]} changed since the run began; "
                "restore what was there"
            )


def reference_provenance(record: dict[str, Any], held: str) -> str:
    """What, beside token ids, determines the reference's log-probabilities.

    `held` says on what device and in what number type it is asked now.
    """
    settings = {name: record["settings"][name] for name in ("bits", "group_size", "dtype")}
    contents = {"model": record["provenance"]["model"], "held": held}
    if start := record["provenance"].get("start"):
        contents["start"] = start
    if (alpha := record["settings"].get("ld_alpha")) is not None:
        settings["ld_alpha"] = alpha
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    return json.dumps({"scorer": SCORER_VERSION, **contents, **settings, **versions})


CURVES = "curves.png"  # in the run folder
