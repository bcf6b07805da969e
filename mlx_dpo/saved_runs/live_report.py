"""The report of runs in training: a page on loopback that shows new steps as they are taken.

The server only reads the files of the run folders. It may run in a thread of the training process
or in another process, and the runs may start, stop, resume or start over while it runs.
"""

import json
import os
import shlex
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from threading import Event, Lock
from time import monotonic, time
from typing import Any
from zlib import crc32

from mlx_dpo.errors import ConfigError, DPOError, RunError
from mlx_dpo.io.bounded import parse_json
from mlx_dpo.io.locks import is_locked
from mlx_dpo.models.files import MODEL_FOLDER
from mlx_dpo.reporting.curves import RunLines
from mlx_dpo.reporting.metrics_log import MetricsTail
from mlx_dpo.reporting.run_page import (
    LiveStatus,
    RunDetails,
    line_values,
    render_live_page,
    render_sections,
)
from mlx_dpo.reporting.samples import EvaluationSamples, read_samples
from mlx_dpo.runs.folder import RunPaths, read_record
from mlx_dpo.saved_runs.details import (
    LoggedRun,
    describe_run,
    differing_settings,
    step_seconds,
)
from mlx_dpo.saved_runs.report import shortest_names
from mlx_dpo.types import MetricsRow
from mlx_dpo.units import format_duration
from mlx_dpo.web.loopback import LoopbackServer, PageHandler

ACTIVE_SECONDS = 10.0  # a run whose files changed so recently is taken to be in training
STEPS_FOR_SPEED = 20  # last steps from which the remaining time is estimated
WATCHED_SECONDS = 10.0  # after which the time of evaluations is in the estimate
LAST_REQUEST_SECONDS = 3.0  # for the page to fetch the last state before the server ends


class LiveRun:
    """A run folder as it is now: record, metrics rows, lines and samples, read piece by piece.

    Args:
        index: Index of the run on the page.
        folder: The run folder, which need not exist yet.
        x_axis: A key of `curves.X_AXES`.
    """

    def __init__(self, index: int, folder: str, x_axis: str) -> None:
        self.paths = RunPaths(Path(folder).expanduser())
        self.folder, self.index = folder, index
        self.rows: list[MetricsRow] = []
        self.samples: list[EvaluationSamples] = []
        self.generation = 0  # of the lines, which start over with the metrics file
        self.lines = RunLines(index, num_steps=1, x_axis=x_axis)
        self.logged: LoggedRun | None = None
        self._x_axis = x_axis
        self._tail = MetricsTail(self.paths.metrics)
        self._planned_steps = 0
        self._arrivals = deque[tuple[float, float]](maxlen=60)  # time and step of the latest rows
        self._file_states: dict[Path, tuple[int, ...]] = {}
        self._damage: dict[Path, str] = {}  # by file that cannot be read
        self._written_at = 0.0  # seconds since the epoch

    def refresh(self) -> bool:
        """Read what is new in the folder; return whether anything is."""
        has_record = self._has_changed(self.paths.record)
        has_samples = self._has_changed(self.paths.samples)
        has_rows = self._has_changed(self.paths.metrics)
        if has_record:
            self._read_record()
        if has_rows or has_record:
            self._read_rows()
        if has_samples:
            self._read_samples()
        return has_record or has_samples or has_rows

    def _has_changed(self, path: Path) -> bool:
        """Return whether a file was written since the last call."""
        try:
            stat = os.stat(path)
            state: tuple[int, ...] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            self._written_at = max(self._written_at, stat.st_mtime)
        except OSError:
            state = ()
        changed = self._file_states.get(path, ()) != state
        self._file_states[path] = state
        return changed

    def _read_record(self) -> None:
        self._damage.pop(self.paths.record, None)
        record = None
        try:
            record = read_record(self.paths)
        except DPOError as error:
            self._damage[self.paths.record] = str(error)
        self.logged = None if record is None else LoggedRun(self.paths, record, self.rows)
        if self.logged is not None and self.logged.record.get("steps") != self._planned_steps:
            self._planned_steps = self.logged.record.get("steps") or 0
            self._start_over(self.rows)

    def _read_rows(self) -> None:
        generation = self._tail.generation
        new = self._tail.read_new()
        self._damage.pop(self.paths.metrics, None)
        if self._tail.damage is not None:
            self._damage[self.paths.metrics] = str(self._tail.damage)
        if self._tail.generation != generation:
            self._start_over([])
        if new:
            self._arrivals.append((monotonic(), new[-1]["step"]))
        for row in new:
            self.rows.append(row)
            self.lines.append(row)
            if self.logged is not None:
                self.logged.append(row)

    def _start_over(self, rows: Sequence[MetricsRow]) -> None:
        """Replace the lines by those of these rows."""
        self.generation += 1
        self._arrivals.clear()
        self.rows = list(rows)
        if self.logged is not None:
            self.logged = LoggedRun(self.paths, self.logged.record, rows)
        self.lines = RunLines(
            self.index, num_steps=max(1, self._planned_steps, len(rows)), x_axis=self._x_axis
        )
        for row in self.rows:
            self.lines.append(row)

    def _read_samples(self) -> None:
        self._damage.pop(self.paths.samples, None)
        try:
            self.samples = read_samples(self.paths.samples)
        except DPOError as error:
            self._damage[self.paths.samples] = str(error)

    @property
    def position(self) -> list[Any]:
        """Generation of the lines, and the number of points of each that stay as they are."""
        return [self.generation, [line.num_final for _, line in self.lines.growing]]

    def new_lines(self, generation: int, counts: Sequence[int]) -> list[dict[str, Any]]:
        """Return the points that a page lacks, which was last sent this `position`."""
        lines = self.lines.growing
        if generation != self.generation or len(counts) != len(lines):
            counts = [0] * len(lines)
        return [
            line_values(title, line.points(count), count)
            for ((title, *_), line), count in zip(lines, counts, strict=True)
            if line.num_points > count
        ]

    def details(self, name: str, differing: dict[str, str]) -> RunDetails:
        """Return the run's texts for the page."""
        if self.logged is None:
            return RunDetails(name, state="waiting")
        return describe_run(self.logged, name, differing)._replace(samples=self.samples)

    def status(self, *, is_over: bool) -> LiveStatus:
        """Return what the run is doing.

        Args:
            is_over: Whether the training process says that it takes no more steps.
        """
        if self._damage:
            return LiveStatus("failed", next(iter(self._damage.values())))
        run = self.logged
        if run is None:
            return self._waiting_status(is_over)
        done, total = run.step, int(run.record.get("steps") or 0)
        if run.is_finished:
            time = format_duration(run.seconds)
            early = f" of {total:,}, stopped early" if done < total else ""
            return LiveStatus("finished", f"Finished: {done:,} steps{early}, in {time}")
        if is_over or not self._is_active():
            return self._interrupted_status(done, total)
        if not self.rows:
            text = f"Waiting for the first of {total:,} steps: the reference is scored before it"
            return LiveStatus("waiting", text, 0, total)
        if done >= total:
            text = f"Step {done:,} of {total:,}: evaluating and saving"
            return LiveStatus("training", text, done, total)
        seconds = self._seconds_per_step(run)
        left = f", about {format_duration(seconds * (total - done))} left" if seconds else ""
        return LiveStatus("training", f"Training: step {done:,} of {total:,}{left}", done, total)

    def _seconds_per_step(self, run: LoggedRun) -> float | None:
        """Return the seconds per step, with evaluations once it was watched for long enough."""
        if self._arrivals:
            (start, first), (end, last) = self._arrivals[0], self._arrivals[-1]
            if end - start >= WATCHED_SECONDS and last > first:
                return (end - start) / (last - first)
        recent = run.training_rows[-STEPS_FOR_SPEED - 1 :]
        seconds = [step_seconds(*rows) for rows in pairwise(recent)]
        return fmean(seconds) if seconds else None

    def _waiting_status(self, is_over: bool) -> LiveStatus:
        if is_over:
            return LiveStatus("interrupted", "Ended before the run began")
        if is_locked(self.paths.lock):
            return LiveStatus("waiting", "Loading the model and the pairs")
        return LiveStatus("waiting", f"Waiting for a run in {self.folder}")

    def _interrupted_status(self, done: int, total: int) -> LiveStatus:
        command = f"mlx-dpo train --resume --output {shlex.quote(self.folder)}"
        where = f"after step {done:,} of {total:,}" if done else "before the first step"
        return LiveStatus(
            "interrupted", f"Interrupted {where}; resume with: {command}", done, total
        )

    def _is_active(self) -> bool:
        """Return whether a process trains in the folder, as far as files can show it."""
        if abs(time() - self._written_at) < ACTIVE_SECONDS:
            return True
        return is_locked(self.paths.lock) is not False


class LiveReport:
    """The report of one or several runs, kept up to date from their folders.

    Args:
        folders: Run folders, which need not exist yet.
        x_axis: A key of `curves.X_AXES`.

    Raises:
        ConfigError: a folder is named twice.
        RunError: a folder is that of a model.
    """

    def __init__(self, folders: Sequence[str], x_axis: str = "step") -> None:
        self.runs = [LiveRun(index, folder, x_axis) for index, folder in enumerate(folders)]
        for run in self.runs:
            if (run.paths.folder / "config.json").is_file() and not run.paths.record.is_file():
                raise RunError(f"{run.folder}: {MODEL_FOLDER}")
        self.names = shortest_names([run.paths.folder for run in self.runs])
        self.x_axis = x_axis
        self.is_over = Event()  # the training process takes no more steps
        self.has_sent_last = Event()  # a page has the last state
        self.is_open = False  # a page has asked for an update
        self._lock = Lock()  # pages of several windows are answered in threads
        self._statuses: list[LiveStatus] = []
        self._details: list[RunDetails] = []
        self._parts: dict[str, str] = {}

    def page(self, nonce: str) -> str:
        """Return the whole page, without lines."""
        with self._lock:
            self._refresh()
            return render_live_page(self._details, self._statuses, self.x_axis, nonce=nonce)

    def update(self, cursor: str) -> dict[str, Any]:
        """Return what a page lacks, as JSON values.

        Args:
            cursor: The `cursor` of the page's last update; any other text gives everything.
        """
        with self._lock:
            self.is_open = True
            is_last = self.is_over.is_set()
            self._refresh()
            seen = _parse_cursor(cursor, len(self.runs))
            checksums = {name: crc32(html.encode()) for name, html in self._parts.items()}
            pairs = list(zip(self.runs, seen["runs"], strict=True))
            values = {
                "cursor": json.dumps({"runs": [r.position for r in self.runs], "parts": checksums}),
                "restarted": [
                    r.index for r, (generation, _) in pairs if generation != r.generation
                ],
                "lines": [line for run, place in pairs for line in run.new_lines(*place)],
                "parts": {
                    name: html
                    for name, html in self._parts.items()
                    if seen["parts"].get(name) != checksums[name]
                },
                "progress": self._progress(),
                "isOver": is_last,
            }
        if is_last:
            self.has_sent_last.set()
        return values

    def _refresh(self) -> None:
        """Read the folders; render the parts of the page if anything in them is new."""
        changed = [run.refresh() for run in self.runs]  # every run is read
        statuses = [run.status(is_over=self.is_over.is_set()) for run in self.runs]
        if any(changed) or statuses != self._statuses:
            self._statuses = statuses
            texts = iter(differing_settings([r.logged for r in self.runs if r.logged is not None]))
            self._details = [
                run.details(name, {} if run.logged is None else next(texts))
                for run, name in zip(self.runs, self.names, strict=True)
            ]
            self._parts = render_sections(self._details, statuses)

    def _progress(self) -> int | None:
        """Return the percentage of steps that are taken; None if no run trains."""
        training = [status for status in self._statuses if status.kind == "training"]
        total = sum(status.total for status in training)
        return 100 * sum(status.done for status in training) // total if total else None


def _parse_cursor(text: str, num_runs: int) -> dict[str, Any]:
    """Return the content of a cursor; for anything that is none, the cursor of a new page."""
    new = {"runs": [[-1, []] for _ in range(num_runs)], "parts": {}}
    try:
        cursor = parse_json(text, "the cursor", ConfigError)
    except ConfigError:
        return new
    is_cursor = (
        isinstance(cursor, dict)
        and isinstance(cursor.get("parts"), dict)
        and isinstance(cursor.get("runs"), list)
        and len(cursor["runs"]) == num_runs
        and all(map(_is_position, cursor["runs"]))
    )
    return cursor if is_cursor else new


def _is_position(value: object) -> bool:
    match value:
        case [int(), [*counts]]:
            return all(type(count) is int and count >= 0 for count in counts)
    return False


class ReportServer(LoopbackServer):
    """The HTTP server of a live report, which answers the page's requests for news."""

    def __init__(self, report: LiveReport, port: int = 0) -> None:
        """Start listening on `port`; port 0 picks a free port.

        Raises:
            ConfigError: the port is in use.
        """
        self.report = report
        super().__init__(_Handler, port)

    def finish(self) -> None:
        """Show the last state on a page that is open, before the server ends."""
        self.report.is_over.set()
        if self.report.is_open:
            self.report.has_sent_last.wait(LAST_REQUEST_SECONDS)


class _Handler(PageHandler):
    """HTTP handler of a live report."""

    server: ReportServer

    def page(self, nonce: str) -> str:
        return self.server.report.page(nonce)

    def answer_get(self, path: str, query: dict[str, list[str]]) -> bool:
        if path != "/update":
            return False
        news = self.server.report.update(query.get("cursor", [""])[0])
        self.send_text(200, "application/json", json.dumps(news))
        return True
