"""The steps of a training run: a live bar with running means at a terminal, lines in a log."""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_dpo.phases import Advance, NoDisplay, shown_on
from mlx_dpo.reporting.metrics_text import (
    evaluation_texts,
    format_evaluation,
    format_step,
    step_texts,
)
from mlx_dpo.reporting.terminal.console import make_status_console
from mlx_dpo.reporting.terminal.status import (
    PATIENCE,
    Clock,
    Phase,
    StatusLines,
    format_times,
    is_status_shown,
)
from mlx_dpo.types import MetricsRow

WINDOW = 10  # steps whose mean the bar shows: figures of a single step jump
LABEL = len("held out  ")
MARGIN = 3  # columns at the right: what the terminal shows for Ctrl-C must not wrap the last line


class StepDisplay(Protocol):
    """Interface of a display that shows a run's metrics rows one by one."""

    def show(self, row: MetricsRow) -> None:
        """Show the metrics row of a training step or of an evaluation."""

    def show_note(self, text: str) -> None:
        """Show a note on what the program does; may be called by a signal handler."""


class StepTimer:
    """Elapsed and remaining time of a run's steps, from the first step of this process on."""

    def __init__(self, total: int, done: int, clock: Clock) -> None:
        self._phase = Phase("steps", total - done, "steps", began=clock())
        self._before, self._clock = done, clock

    def times(self, step: int) -> str:
        """Return the times after a step as text, such as `0:42 elapsed, 0:31 left`."""
        elapsed = self._clock() - self._phase.began
        self._phase.done = step - self._before
        return format_times(elapsed, self._phase.remaining(elapsed))


class PlainLines:
    """A display that prints metrics rows as plain lines, for logs and pipes."""

    def __init__(self, console: Console, timer: StepTimer, total: int, every: int) -> None:
        self._console, self._timer, self._total, self._every = console, timer, total, every

    def show(self, row: MetricsRow) -> None:
        """Print a row if it is an evaluation, the last step, or a step divisible by `every`."""
        step = int(row["step"])
        if "eval_loss" in row:
            self._console.print(format_evaluation(row))
        elif step % self._every == 0 or step == self._total:
            self._console.print(f"{format_step(row, self._total)}  {self._timer.times(step)}")

    def show_note(self, text: str) -> None:
        """Print a note as a line on stderr."""
        make_status_console().print(text)


class StepBar:
    """A progress bar over the whole width, the last steps' means and the last evaluation.

    While a phase such as an evaluation runs between two steps, it is named below.
    """

    def __init__(self, console: Console, timer: StepTimer, total: int, done: int) -> None:
        self._console, self._timer, self._total, self._step = console, timer, total, done
        self._rows: deque[MetricsRow] = deque(maxlen=WINDOW)
        self._evaluation: MetricsRow | None = None
        self._phases: list[Phase] = []
        self._note = ""
        self.is_done = False

    def show(self, row: MetricsRow) -> None:
        """Advance the bar to a training step, or print an evaluation above the bar."""
        if "eval_loss" in row:
            self._console.print(format_evaluation(row))
            self._evaluation = row
            return
        self._rows.append(row)
        self._step = int(row["step"])

    def show_note(self, text: str) -> None:
        """Show a note below the bar. It is drawn later: a signal may interrupt another output."""
        self._note = text

    # --- display of phases -----------------------------------------------------------------

    def announce(self, title: str) -> None:
        """Show nothing: the bar is there."""

    @contextmanager
    def show_phase(self, title: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Name a phase below the bar."""
        phase = Phase(title, total, unit, began=0.0)
        self._phases.append(phase)

        def advance(items: int) -> None:
            phase.done += items

        try:
            yield advance
        finally:
            self._phases.remove(phase)

    def paused(self) -> AbstractContextManager[None]:
        """Do nothing: other output is printed above the bar."""
        return nullcontext()

    # --- rendering -------------------------------------------------------------------------

    def render(self) -> RenderableType:
        """Return the bar and the lines below it, as wide as the terminal is now."""
        width = max(20, self._console.width - MARGIN)
        lines: list[RenderableType] = [self._bar(width)]
        if self._rows:
            row = _means(self._rows)
            texts = step_texts(row)
            texts.insert(-1, f"mean of {len(self._rows)} step{'s' * (len(self._rows) != 1)}")
            lines.append(_labelled("train", texts, width))
        if self._evaluation is not None and not self.is_done:
            texts = [*evaluation_texts(self._evaluation), f"at step {self._evaluation['step']:.0f}"]
            lines.append(_labelled("held out", texts, width))
        below = [self._note, *(phase.text() for phase in self._phases[-1:])]
        lines += [Text(text[:width], style="dim") for text in below if text and not self.is_done]
        return Group(*lines)

    def _bar(self, width: int) -> Table:
        line = Table.grid(padding=(0, 1))
        line.width = width
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        bar = ProgressBar(self._total, self._step)
        times = Text(self._timer.times(self._step), style="dim")
        line.add_row(f"step {self._step}/{self._total}", bar, times)
        return line


class _PhasesBelow:
    """The display of phases of a bar."""

    def __init__(self, bar: StepBar) -> None:
        self.announce, self.show, self.paused = bar.announce, bar.show_phase, bar.paused


def _means(rows: Sequence[MetricsRow]) -> MetricsRow:
    """Return the mean of each metric over the rows that have it; the last step and rate."""
    last = rows[-1]
    means = {
        key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows)
        for key in last
    }
    now = ("step", "learning_rate", "peak_memory_gb")
    return means | {key: last[key] for key in now if key in last}


def _labelled(label: str, texts: Sequence[str], width: int) -> Text:
    """Return a line with a label and as many texts, from the first on, as fit into the width."""
    shown = list(texts)
    while len(shown) > 1 and LABEL + len("  ".join(shown)) > width:
        shown.pop()
    return Text.assemble((f"{label:<{LABEL}}", "dim"), "  ".join(shown), no_wrap=True)


@contextmanager
def show_steps(
    console: Console, *, total: int, done: int, every: int, clock: Clock = time.monotonic
) -> Iterator[StepDisplay]:
    """Yield the display of a run's steps: a live bar on a terminal, else plain lines.

    Args:
        total: number of optimizer steps of the run.
        done: number of steps taken before a resume.
        every: number of steps from one plain line to the next.
        clock: function that returns a time in seconds.
    """
    timer = StepTimer(total, done, clock)
    if not console.is_terminal or console.is_dumb_terminal:
        lines = StatusLines(make_status_console(), clock, patience=PATIENCE)
        with shown_on(lines if is_status_shown() else NoDisplay()):
            yield PlainLines(console, timer, total, every)
        return
    bar = StepBar(console, timer, total, done)
    live = Live(
        get_renderable=bar.render,
        console=console,
        refresh_per_second=4,
        vertical_overflow="visible",
        redirect_stderr=sys.stderr.isatty(),  # a file gets what is meant for it
    )
    with shown_on(_PhasesBelow(bar)), live:
        try:
            yield bar
        finally:
            bar.is_done = True
