"""Results of `mlx-dpo eval` in the run folder: one JSON file per measurement and its subject."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_dpo.adapters.adapter_files import CONFIG, adapter_digest
from mlx_dpo.errors import DamagedFileError, RunError, reason
from mlx_dpo.io.atomic import is_temporary, write_file
from mlx_dpo.io.checksums import damaged, read_checked_json, to_checked_json
from mlx_dpo.reporting.evaluations.shown_result import ShownResult, show_result
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.saved_runs.open import OpenRun

MAX_SUBJECT = 60  # characters of a subject in the name of its file
FIELD_TYPES: dict[str, type] = {
    "measurement": str, "subject": str, "date": str, "adapter_digest": str, "versions": dict,
    "settings": dict, "results": dict,
}  # fmt: skip


@dataclass(frozen=True)
class StoredEvaluation:
    """The results of one measurement of a run, as stored in its folder.

    Attributes:
        measurement: kind of the measurement, such as `perplexity`.
        subject: what was measured on, such as the name of a file.
        date: time in UTC, such as `2026-11-30T06:15:00+00:00`.
        adapter_digest: digest of the adapter that was measured.
        versions: versions of mlx-dpo and of the libraries, by name.
        settings: settings that determine the results.
        results: the results, by name; `reporting.evaluations` makes tables of them.
    """

    measurement: str
    subject: str
    date: str
    adapter_digest: str
    versions: dict[str, str]
    settings: dict[str, Any]
    results: dict[str, Any]

    @property
    def file_name(self) -> str:
        """Name of the file; a newer result of the same measurement and subject replaces it."""
        words = re.sub(r"[^A-Za-z0-9._]+", "-", self.subject).strip("-.")
        is_same = words == self.subject.replace(" ", "-")
        if not is_same or len(words) > MAX_SUBJECT:  # keep different subjects apart
            words = f"{words[:MAX_SUBJECT]}-{sha256(self.subject.encode()).hexdigest()[:8]}"
        return f"{self.measurement}-{words}.json"


def save_evaluation(paths: RunPaths, evaluation: StoredEvaluation) -> Path:
    """Write a result to the run folder, atomically, and return the path of its file.

    Raises:
        RunError: the file cannot be written.
    """
    path = paths.evaluations / evaluation.file_name
    try:
        path.parent.mkdir(exist_ok=True)
        write_file(path, to_checked_json(asdict(evaluation)))
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({reason(error)})") from error
    return path


def read_evaluations(paths: RunPaths, *, adapter_digest: str | None) -> list[StoredEvaluation]:
    """Return the stored results of a run, the oldest first.

    Args:
        paths: paths of the run's files.
        adapter_digest: leave out results of other adapters than this; None returns all.

    Raises:
        DamagedFileError: a file is damaged, or it is not a stored result.
    """
    files = sorted(paths.evaluations.glob("*.json")) if paths.evaluations.is_dir() else []
    stored = [_read(file) for file in files if not is_temporary(file)]
    wanted = [e for e in stored if adapter_digest in (None, e.adapter_digest)]
    return sorted(wanted, key=lambda evaluation: evaluation.date)


def read_present_evaluations(run: OpenRun) -> list[StoredEvaluation]:
    """Return the stored results of a run's newest adapter, the oldest first.

    There are none if the adapter is not in its folder: a result could then be of another adapter.

    Raises:
        DamagedFileError: the adapter or a stored result is damaged.
    """
    if not run.paths.evaluations.is_dir() or not (run.adapter / CONFIG).is_file():
        return []
    return read_evaluations(run.paths, adapter_digest=adapter_digest(run.adapter))


def show_evaluation(
    run: OpenRun, stored: StoredEvaluation, subject: str | None = None
) -> ShownResult | None:
    """Return a stored result as tables and sentences; None for a measurement without tables.

    Args:
        run: the run that it was read from.
        stored: the result.
        subject: what the tables are to name as measured on; None for the stored name.

    Raises:
        DamagedFileError: the results are not those of such a measurement.
    """
    name = stored.subject if subject is None else subject
    try:
        return show_result(stored.measurement, name, stored.date, stored.results)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        path = run.paths.evaluations / stored.file_name
        raise _unknown(path, f"no results of `{stored.measurement}`") from error


def _read(path: Path) -> StoredEvaluation:
    record: Mapping[str, Any] = read_checked_json(path)[0]
    for name, kind in FIELD_TYPES.items():
        if not isinstance(record.get(name), kind):
            found = "nothing" if name not in record else type(record[name]).__name__
            raise _unknown(path, f"`{name}` must be {kind.__name__}, found {found}")
    return StoredEvaluation(**{name: record[name] for name in FIELD_TYPES})


def _unknown(path: Path, found: str) -> DamagedFileError:
    return damaged(path, found, "remove the file, and measure again with `mlx-dpo eval`")
