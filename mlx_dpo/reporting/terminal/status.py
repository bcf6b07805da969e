"""The status of long phases on stderr: a spinner at a terminal, lines in a log."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mlx_dpo.phases import Advance, shown_on
from mlx_dpo.reporting.terminal.console import make_status_console
from mlx_dpo.units import format_duration

STATUS_VARIABLE = "MLX_DPO_STATUS"  # 0: no phases are shown
Clock = Callable[[], float]
BAR_WIDTH = 20  # columns
REFRESH = 8  # per second
PATIENCE = 10.0  # seconds before the first line of a phase within a counted one
SHORT = 1.0  # seconds; a log gets no second line of a phase sooner
UNCOUNTED = 30.0  # seconds between the lines of a phase whose number of items is unknown


@dataclass
class Phase:
    """A phase of long work, and how much of it is done."""

    title: str
    total: int | None
    unit: str
    began: float  # seconds on the clock of its display
    done: int = 0

    def remaining(self, elapsed: float) -> float | None:
        """Return the estimated seconds to the end; None at the end, or if there is no estimate."""
        if not self.done or self.total is None or self.done >= self.total:
            return None
        return elapsed * (self.total - self.done) / self.done

    def text(self) -> str:
        """Return title and count as text, such as `Evaluating 12/50 pairs`."""
        return f"{self.title} {self.count()}" if self.total or self.done else self.title

    def count(self) -> str:
        """Return the number of items done as text, such as `1,200/5,000 rows`."""
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,}/{self.total:,} {self.unit}"


def format_times(elapsed: float, remaining: float | None) -> str:
    """Return elapsed and remaining seconds as text, such as `0:42 elapsed, 0:31 left`."""
    left = "" if remaining is None else f", {format_duration(remaining)} left"
    return f"{format_duration(elapsed)} elapsed{left}"


class StatusLines:
    """A display of phases as lines, for logs: no carriage returns, no escape codes.

    Each phase is one line before it begins. A counted phase adds a line at every tenth, but none
    sooner than a second after the last. Within a counted phase, only long phases have lines.

    Args:
        patience: seconds before the first line of a phase; 0 prints it before the phase begins.
    """

    def __init__(
        self, console: Console, clock: Clock = time.monotonic, *, patience: float = 0.0
    ) -> None:
        self._console, self._clock, self._patience = console, clock, patience
        self._dots = "..." if console.options.ascii_only else "…"

    def announce(self, title: str) -> None:
        """Print a title as a line."""
        if not self._patience:
            self._console.print(f"{title}{self._dots}")

    @contextmanager
    def show(self, title: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Print a line before the phase, and lines while it advances."""
        count = "" if total is None else f": {total:,} {unit[:-1] if total == 1 else unit}"
        self.announce(title + count)
        shown = Phase(title, total, unit, began=self._clock())
        printed = (0, shown.began)  # tenths, seconds
        patience = self._patience

        def advance(items: int) -> None:
            nonlocal printed
            shown.done += items
            now = self._clock()
            tenths, since = _tenths(shown), now - printed[1]
            wait = max(patience, SHORT if total else UNCOUNTED)
            is_due = since >= wait and (not total or tenths > printed[0])
            if is_due:
                printed = (tenths, now)
                self._print_progress(shown, now - shown.began)

        if total is not None:
            self._patience = max(patience, PATIENCE)
        try:
            yield advance
        finally:
            self._patience = patience

    def _print_progress(self, shown: Phase, elapsed: float) -> None:
        share = f" ({shown.done / shown.total:.0%})" if shown.total else ""
        times = format_times(elapsed, shown.remaining(elapsed))
        self._console.print(f"{shown.title}: {shown.count()}{share}, {times}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do nothing: lines are complete."""
        yield


def _tenths(shown: Phase) -> int:
    return 10 * shown.done // shown.total if shown.total else 0


class StatusSpinner:
    """A display of the innermost phase on one line of a terminal; the line disappears at the end.

    Args:
        console: console of the terminal.
    """

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._phases: list[Phase] = []
        self._announced: Phase | None = None
        self._live: Live | None = None
        self._pauses = 0
        self._lock = RLock()  # a worker thread may print a warning in the middle of a phase
        self._spinner = Spinner("line" if console.options.ascii_only else "dots", style="dim")

    def announce(self, title: str) -> None:
        """Show a title until the next phase begins or something is printed."""
        self._announced = Phase(title, None, "", began=self._clock())
        self._update()

    @contextmanager
    def show(self, title: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Show a phase instead of the phase around it."""
        shown = Phase(title, total, unit, began=self._clock())
        with self._lock:
            self._announced = None
            self._phases.append(shown)
            self._update()

        def advance(items: int) -> None:
            shown.done += items

        try:
            yield advance
        finally:
            with self._lock:
                # By identity; `close` may have ended the phase of another thread already.
                self._phases = [phase for phase in self._phases if phase is not shown]
                self._update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Remove the line inside the `with` block, and an announcement for good."""
        with self._lock:
            self._announced = None
            self._pauses += 1
            self._update()
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                self._update()

    def close(self) -> None:
        """Remove the line from the terminal."""
        with self._lock:
            self._announced = None
            self._phases.clear()
            self._update()

    def _update(self) -> None:
        """Show the line if there is a phase to show, else remove it."""
        with self._lock:
            if self._pauses or (self._announced is None and not self._phases):
                live, self._live = self._live, None
                if live is not None:
                    live.stop()
            else:
                self._show_line()

    def _show_line(self) -> None:
        if self._live is None:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                transient=True,
                refresh_per_second=REFRESH,
                redirect_stdout=False,  # stdout may be a pipe, whose reader wants results only
            )
            self._live.start(refresh=True)
        else:
            self._live.refresh()

    def _render(self) -> RenderableType:
        phases = [self._announced] if self._announced else [*self._phases]
        if not phases:  # removed by the main thread just now
            return Text("")
        # The outermost count tells most; what is done within it stands behind.
        shown = next((phase for phase in phases if phase.total), phases[-1])
        elapsed = self._clock() - shown.began
        line = Table.grid(padding=(0, 1))
        row: list[RenderableType] = [self._spinner, shown.title]
        if shown.total:
            row.append(ProgressBar(shown.total, shown.done, width=BAR_WIDTH))
        if shown.done:
            row.append(shown.count())
        if elapsed >= SHORT:
            row.append(Text(format_times(elapsed, shown.remaining(elapsed)), style="dim"))
        if phases[-1] is not shown:
            row.append(Text(phases[-1].text(), style="dim"))
        for _ in row:
            line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(*row)
        return line


def is_status_shown() -> bool:
    """Return whether phases are shown: MLX_DPO_STATUS=0 turns them off."""
    return os.environ.get(STATUS_VARIABLE) != "0"


@contextmanager
def status_on_stderr() -> Iterator[None]:
    """Show phases on stderr inside the `with` block, unless MLX_DPO_STATUS=0 turns them off."""
    if not is_status_shown():
        yield
        return
    console = make_status_console()
    if not console.is_terminal or console.is_dumb_terminal:
        with shown_on(StatusLines(console)):
            yield
        return
    display = StatusSpinner(console)
    try:
        with shown_on(display):
            yield
    finally:
        display.close()
