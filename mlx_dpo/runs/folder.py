"""The run folder: its files, its lock, and the run record in `run.json`."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import count
from pathlib import Path
from secrets import token_hex
from shlex import quote
from types import NoneType
from typing import Any

from mlx_dpo.adapters import peft
from mlx_dpo.adapters.adapter_files import CONFIG, WEIGHTS, adapter_digest
from mlx_dpo.config.dpo_config import DPOConfig, rename_earlier_settings
from mlx_dpo.data.chat_templates.template_date import get_day, today
from mlx_dpo.errors import ConfigError, DamagedFileError, RunError, reason
from mlx_dpo.io.atomic import is_temporary, write_file
from mlx_dpo.io.checksums import read_checked_json, to_checked_json, verify_file
from mlx_dpo.io.locks import lock_file
from mlx_dpo.reporting.metrics_log import read_metrics
from mlx_dpo.runs.inputs import Inputs


@dataclass(frozen=True)
class RunPaths:
    """Paths of the files of a run; adapters are in `folder` itself, where mlx-lm expects them."""

    folder: Path

    @property
    def record(self) -> Path:
        """Path of `run.json`, the run record: settings, provenance, counts and results."""
        return self.folder / "run.json"

    @property
    def metrics(self) -> Path:
        """Path of the metrics file, which has one JSON object per step or evaluation."""
        return self.folder / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Path of the samples file, which has one JSON object per evaluation."""
        return self.folder / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Path of the folder that contains the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Path of the folder with the results of `mlx-dpo eval`, one JSON file each."""
        return self.folder / "evaluations"

    @property
    def best_adapters(self) -> Path:
        """Path of the best evaluations' adapters, which exists until the run is finished."""
        return self.folder / "best"

    @property
    def lock(self) -> Path:
        """Path of the file whose lock shows that a process is training in the folder."""
        return self.folder / ".lock"

    def reference_logps(self, split: str) -> Path:
        """Return the path of the reference log-probs of split `train` or `valid`."""
        return self.folder / "reference" / f"{split}.safetensors"


def write_record(paths: RunPaths, record: dict[str, Any]) -> None:
    """Write the run record with its checksum to `run.json`, replacing the file atomically.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        write_file(paths.record, to_checked_json(record))
    except OSError as error:
        raise RunError(f"{paths.record}: cannot be written ({reason(error)})") from error


def read_record(paths: RunPaths) -> dict[str, Any] | None:
    """Return the run record in `run.json`; None if the file does not exist.

    Key names of earlier versions are replaced by the current ones.

    Raises:
        DamagedFileError: the file does not match its checksum.
        RunError: the file is not a run record.
    """
    if not os.path.lexists(paths.record):
        return None
    record = with_current_keys(read_checked_json(paths.record)[0])
    try:
        check_record(record)
        DPOConfig.from_dict(record["settings"])
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{paths.record}: not a valid record of a run ({error})") from error
    return record


# Entries of a run record and their types; those without a value may be missing.
RECORD_TYPES: dict[str, tuple[type, ...]] = {
    "state": (str,), "steps": (int,), "settings": (dict,), "provenance": (dict,),
    "counts": (dict,), "pairs": (list,), "versions": (dict,), "warnings": (list,), "id": (str,),
    "day": (str, NoneType), "model_folder": (str, NoneType), "reference_folder": (str, NoneType),
    "start_folder": (str, NoneType), "evaluation": (dict, NoneType),
    "best_checkpoint": (dict, NoneType), "stopped_early_at": (int, NoneType),
    "automatic_settings": (dict, NoneType), "chosen_settings": (dict, NoneType),
    "before": (dict, NoneType), "datasets_in_memory": (list, NoneType), "verdict": (dict, NoneType),
    "adapter": (str, NoneType), "adapter_sha256": (str, NoneType), "ranks": (list, NoneType),
    "num_metrics_rows": (int, NoneType), "passes_at_once": (int, NoneType),
}  # fmt: skip
REQUIRED = ("state", "settings", "provenance")
ITEM_TYPES: dict[str, tuple[type, ...]] = {
    "counts": (int,), "pairs": (dict,), "provenance": (str, NoneType), "versions": (str,),
    "warnings": (str,), "evaluation": (int, float), "best_checkpoint": (int, float),
    "chosen_settings": (str,), "before": (int, float), "datasets_in_memory": (str,),
    "ranks": (dict,),
}  # fmt: skip


def check_record(record: Mapping[str, Any]) -> None:
    """Raise `ValueError` if an entry of a run record is missing or has another type."""
    if missing := [name for name in REQUIRED if name not in record]:
        raise ValueError(f"it has no `{missing[0]}`")
    for name in record.keys() & RECORD_TYPES:
        _check_type(f"`{name}`", record[name], RECORD_TYPES[name])
    for name in record.keys() & ITEM_TYPES:
        items = record[name] or ()
        for item in items.values() if isinstance(items, dict) else items:
            _check_type(f"an entry of `{name}`", item, ITEM_TYPES[name])


def _check_type(what: str, value: Any, known: tuple[type, ...]) -> None:
    if not isinstance(value, known) or (isinstance(value, bool) and bool not in known):
        raise ValueError(f"{what} is {type(value).__name__}, not {known[0].__name__}")


def check_finished_files(paths: RunPaths, record: Mapping[str, Any]) -> None:
    """Check the adapters and the metrics of a finished run.

    Raises:
        DamagedFileError: a file is missing or damaged.
    """
    if record.get("adapter_sha256"):  # earlier versions stored no checksums
        verify_file(paths.folder / WEIGHTS, expected=record["adapter_sha256"])
        verify_file(paths.folder / CONFIG)
    peft_weights = paths.folder / peft.WEIGHTS
    if peft_weights.exists():
        verify_file(peft_weights)
    read_metrics(paths.metrics, num_rows=record.get("num_metrics_rows") or 0)


def recorded_day(record: Mapping[str, Any] | None) -> date | None:
    """Return the day on which the run of a record began; None for earlier versions' records.

    Raises:
        RunError: the record has something else in its place.
    """
    day = (record or {}).get("day")
    try:
        return None if day is None else date.fromisoformat(day)
    except (TypeError, ValueError):
        raise RunError(
            f"run.json: `day` must be a date such as 2026-01-31, found {str(day)[:40]!r}; restore "
            "the file"
        ) from None


def day_of_run(earlier: Mapping[str, Any] | None) -> date:
    """Return the day on which a resumed run began, given its record; today for a new run."""
    return recorded_day(earlier) or today()


# Keys of records that earlier versions wrote, and the current names.
OLD_KEYS = {"settled": "automatic_settings", "kept": "best_checkpoint"}
OLD_PROVENANCE_KEYS = {
    "held": "device_and_dtype",
    "start": "start_adapter",
    "reference": "reference_model",
}


def with_current_keys(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run record with key names of earlier versions replaced by the current ones."""
    renamed = {OLD_KEYS.get(key, key): value for key, value in record.items()}
    if isinstance(settings := renamed.get("settings"), dict):
        renamed["settings"] = rename_earlier_settings(settings)
    if isinstance(values := renamed.get("provenance"), dict):
        renamed["provenance"] = {
            OLD_PROVENANCE_KEYS.get(key, key): value for key, value in values.items()
        }
    return renamed


def check_replaceable(paths: RunPaths) -> None:
    """Raise `RunError` if the folder has a `run.json` of another program."""
    if os.path.lexists(paths.record):
        with suppress(DamagedFileError):  # a damaged run is removed as well
            if missing := set(REQUIRED) - read_checked_json(paths.record)[0].keys():
                found = f"not a record of mlx-dpo, without `{min(missing)}`"
                raise RunError(f"{paths.record}: {found}; choose another --output")


def remove_run(paths: RunPaths) -> None:
    """Remove record, metrics, samples, results, checkpoints, best adapters and reference logps."""
    references = paths.reference_logps("train").parent
    for folder in (paths.checkpoints, paths.best_adapters, paths.evaluations, references):
        shutil.rmtree(folder, ignore_errors=True)
    paths.metrics.unlink(missing_ok=True)
    paths.samples.unlink(missing_ok=True)
    paths.record.unlink(missing_ok=True)


def check_run_folder(paths: RunPaths) -> None:
    """Raise `RunError` if the folder contains files but is not a run folder."""
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


LOCK_RISK = (
    "a second run could write into this folder at the same time: start only one, or choose "
    "an --output on a local disk"
)


@contextmanager
def lock_folder(paths: RunPaths) -> Iterator[None]:
    """Create the run folder and lock it inside the block; afterwards remove the folder if empty.

    The system releases the lock however the process ends, because the lock belongs to an open file.

    Raises:
        RunError: another process has the lock, or the folder cannot be written.
    """
    try:
        paths.folder.mkdir(parents=True, exist_ok=True)
        handle = paths.lock.open("w")
    except OSError as error:
        found = f"cannot be written ({error.strerror})"
        raise RunError(f"{paths.folder}: {found}; choose another --output") from error
    with handle:
        try:
            lock_file(handle, wait=False, risk=LOCK_RISK)
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


CURVES = "curves.png"  # plot of the metrics, in the run folder
SCORER_VERSION = 2  # increase when a change of the scorers changes log-probabilities
PROVENANCE_NAMES = {
    "model": "the model",
    "tokenizer": "the tokenizer",
    "device_and_dtype": "the device or its dtype",
    "train": "the training pairs",
    "valid": "the held-out pairs",
    "start_adapter": "the start adapter",
    "reference_model": "the reference model",
}


def start_adapter_provenance(config: DPOConfig) -> dict[str, Any]:
    """Return a dict with the digest of the start adapter, or an empty dict if there is none.

    Raises:
        ModelError: the adapter that `start_adapter` names does not exist.
    """
    folder = config.start_adapter
    return {} if folder is None else {"start_adapter": adapter_digest(Path(folder))}


def new_record(
    config: DPOConfig,
    inputs: Inputs,
    start: dict[str, Any],
    earlier: Mapping[str, Any] | None = None,
    *,
    total_steps: int,
) -> dict[str, Any]:
    """Create the run record of a run that is about to begin.

    Args:
        start: digests of the start adapter and of a separate reference model, by key.
        earlier: run record of the run that is resumed; its id is kept.
        total_steps: number of optimizer steps of the run.
    """
    day = get_day(inputs.base.tokenizer)
    return {
        "id": (earlier or {}).get("id") or token_hex(8),
        "day": None if day is None else str(day),  # that a chat template with a date prints
        "state": "unfinished",
        "steps": total_steps,
        "settings": config.to_dict(),
        "provenance": inputs.provenance(config) | start,
        "counts": {"train": len(inputs.train), "valid": len(inputs.valid)},
        "pairs": [report.to_dict() for report in inputs.reports],
        # Relative to the run folder: the run can be opened from any current folder.
        "model_folder": _relative(config.model, config.output),
        "reference_folder": config.reference_model
        and _relative(config.reference_model, config.output),
        "start_folder": config.start_adapter and _relative(config.start_adapter, config.output),
        "versions": {name: version(name) for name in ("mlx-dpo", "mlx", "mlx-lm")},
        # Settings that were not given, and what their values were chosen by.
        "chosen_settings": (earlier or {}).get("chosen_settings") or {},
        "evaluation": None,
        "best_checkpoint": None,
        "stopped_early_at": None,
        "warnings": [],
        "verdict": None,
        # On which ranks and hosts the steps were trained; None: always by one process.
        "ranks": (earlier or {}).get("ranks"),
    }


def hub_model_id(record: Mapping[str, Any]) -> str | None:
    """Return the Hub id of the base model of a run; None if the model is a local folder."""
    return None if record["model_folder"] else str(record["settings"]["model"])


def _relative(model: str, output: str) -> str | None:
    folder = Path(model).expanduser()
    return os.path.relpath(folder, output) if folder.is_dir() else None


def check_resumable(
    paths: RunPaths, earlier: dict[str, Any], config: DPOConfig, *, resume: bool
) -> None:
    """Raise `RunError` if the run in the folder cannot be resumed or `resume` is False.

    A run can be resumed if it is unfinished and has the same settings.

    Args:
        earlier: run record (content of `run.json`) of the run in the folder.
        config: settings of the run that is about to begin.
        resume: whether the user wants to resume the run.
    """
    if earlier["state"] == "finished":
        steps = earlier.get("stopped_early_at") or earlier["steps"]
        raise RunError(
            f"{paths.folder}: this run is finished after {steps} steps; to train further: "
            f"{_command_to_train_further(paths.folder, earlier)}; or choose another --output, or "
            "--overwrite (in Python: `overwrite=True`) to replace the run"
        )
    if not resume:
        advice = "add --resume to continue it, or choose another --output"
        raise RunError(f"{paths.folder}: holds an unfinished run; {advice}")
    before = DPOConfig.from_dict(earlier["settings"])
    if (name := before.find_difference(config)) is not None:
        raise RunError(
            f"{paths.folder}: the run began with {name} = {_shown(getattr(before, name))}, not "
            f"{_shown(getattr(config, name))}; resume with the same settings, or choose another "
            "--output"
        )


def _command_to_train_further(folder: Path, record: Mapping[str, Any]) -> str:
    """Return the command that starts a new run from the adapters of a finished run."""
    settings = record["settings"]
    number = next(n for n in count(2) if not folder.with_name(f"{folder.name}-{n}").exists())
    words = [*settings["pairs"], "--model", settings["model"], "--start-adapter", str(folder)]
    words += ["--output", f"{folder}-{number}"]
    return " ".join(["mlx-dpo train", *["PAIRS"] * (not settings["pairs"]), *map(quote, words)])


def _shown(value: Any) -> str:
    return "its default" if value is None else repr(value)


def check_provenance(paths: RunPaths, earlier: dict[str, Any], now: Mapping[str, str]) -> None:
    """Raise `RunError` if model, pairs or adapters have changed since the run began.

    Args:
        earlier: run record (content of `run.json`) from when the run began.
        now: digests of the present inputs.
    """
    for name, content in now.items():
        if earlier["provenance"][name] != content:
            raise RunError(
                f"{paths.folder}: {PROVENANCE_NAMES[name]} changed since the run began; "
                "restore the earlier content"
            )


def reference_provenance(record: dict[str, Any], device_and_dtype: str) -> str:
    """Return a text that identifies everything that determines the reference log-probs.

    The text leaves out the token ids of the pairs. It is part of the keys of the log-probs cache.

    Args:
        record: run record (content of `run.json`).
        device_and_dtype: device and dtype with which the reference computes now.
    """
    settings = {name: record["settings"][name] for name in ("bits", "group_size", "dtype")}
    # The names "held" and "start" are part of the key of caches that exist already.
    contents = {"model": record["provenance"]["model"], "held": device_and_dtype}
    if start := record["provenance"].get("start_adapter"):
        contents["start"] = start
    if (alpha := record["settings"].get("ld_alpha")) is not None:
        settings["ld_alpha"] = alpha
    # Last bits differ with passes by tokens, which `auto` had not before it recorded a scorer.
    by_tokens = {"trie": "trie", "auto": (record.get("automatic_settings") or {}).get("scorer")}
    if scorer := by_tokens.get(record["settings"].get("scorer")):
        contents["passes"] = f"by tokens, {scorer}"
    settings |= {package: version(package) for package in ("mlx", "mlx-lm")}
    return json.dumps({"scorer": SCORER_VERSION, **contents, **settings})
