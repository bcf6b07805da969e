"""Interface of an experiment tracker, and the set of trackers that a run logs to.

Each metrics row is logged once, and a tracker that fails does not end the run. When a run is
resumed, the tracker's files on this machine are written again from `metrics.jsonl`: a killed
tracker may not have saved all rows, and the steps after the last checkpoint are computed again.
A tracker's server receives only the rows that it does not have.
"""

import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from mlx_dpo.errors import reason
from mlx_dpo.types import MetricsRow

DEFAULT_PROJECT = "mlx-dpo"  # if neither `project` nor the tracker's own settings name one

# Errors that libraries raise for disks, networks and names; some add their own classes.
COMMON_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Facts about a run that a tracker stores together with the metrics."""

    id: str
    name: str
    project: str | None  # None: the tracker's own setting, else DEFAULT_PROJECT
    folder: Path  # the run folder
    settings: Mapping[str, Any]
    last_logged_step: int = 0  # last step that an earlier process logged to this tracker


class Tracker(Protocol):
    """Interface of an experiment tracker that a run logs to."""

    name: ClassVar[str]  # in `report_to`, and of the extra that installs the library
    library: ClassVar[str]  # the module to import
    has_run_names: ClassVar[bool]  # False if `run_name` and `project` have no effect
    location: str  # a URL or a command that shows the run

    def log(self, row: MetricsRow) -> None:
        """Log a metrics row, unless the tracker already has the row."""

    def close(self, *, completed: bool) -> None:
        """Save or upload the remaining rows, and mark the run as completed or as failed."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why runs cannot be logged and how to fix it; None if runs can be logged."""

    @staticmethod
    def library_errors() -> tuple[type[Exception], ...]:
        """Return the classes of exceptions that the tracker's library raises on failure."""


def with_transformers_names(row: MetricsRow) -> dict[str, float]:
    """Return the metrics of a row under transformers' names, such as `train/loss`, `eval/loss`."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in row.items()
        if name != "step"
    }


@dataclass
class OpenTrackers:
    """The trackers that a run logs to. A tracker that fails is closed and removed."""

    trackers: list[Tracker] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # failures and library warnings, for the user

    def log(self, row: MetricsRow) -> None:
        """Log a metrics row to every tracker."""
        for tracker in list(self.trackers):
            try:
                tracker.log(row)
            except tracker.library_errors() as error:
                self.trackers.remove(tracker)
                self.warnings.append(
                    f"{tracker.name}: logging stopped at step {int(row['step'])} "
                    f"({reason(error)}); the run continues, and metrics.jsonl has every row"
                )
                self._close(tracker, completed=False, warned=[])

    def close(self, *, completed: bool) -> None:
        """Close every tracker and mark the run as completed or as failed."""
        while self.trackers:
            tracker = self.trackers.pop()
            error = self._close(tracker, completed=completed, warned=self.warnings)
            if error is not None:
                self.warnings.append(
                    f"{tracker.name}: the last rows may be missing ({reason(error)}); "
                    "metrics.jsonl has every row"
                )

    @staticmethod
    def _close(tracker: Tracker, *, completed: bool, warned: list[str]) -> Exception | None:
        try:
            with captured_output(tracker.name, warned):
                tracker.close(completed=completed)
        except tracker.library_errors() as error:
            return error
        return None


def remove_other_folders(current: Path, folders: Iterable[Path]) -> None:
    """Remove all `folders` of a tracker except `current`.

    They were written before the run was resumed, and `current` receives all their rows again.
    """
    for folder in folders:
        if folder != current:
            shutil.rmtree(folder)


@contextmanager
def captured_output(name: str = "", warned: list[str] | None = None) -> Iterator[None]:
    """Discard what a library prints inside the block, and append its warnings to `warned`.

    Each warning begins with `name`. Tracker libraries print for their own command line, which would
    break the progress bar.
    """
    with (
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            yield
        finally:
            if warned is not None:
                warned += [
                    f"{name}: {reason(cast(Warning, warning.message)).lstrip('* ')}"
                    for warning in caught
                    if issubclass(warning.category, UserWarning)
                ]
