"""Terminal output of a training run: its facts, its progress and its final metrics."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mlx_dpo.losses.metrics import EVAL_PREFIX, METRICS
from mlx_dpo.terminal_text import escape_controls
from mlx_dpo.types import MetricsRow

# Label and key of an evaluation row: the metrics that are better in one direction.
FINAL_METRICS = tuple(
    (metric.label, EVAL_PREFIX + metric.name) for metric in METRICS.values() if metric.better
)

ZERO_MARGIN = 0.0005  # is shown as 0.000
# Label, key of an evaluation row and format of the metrics of sampled answers.
SAMPLE_METRICS = (
    ("tokens per answer", f"{EVAL_PREFIX}completions/mean_length", ".1f"),
    ("answers cut", f"{EVAL_PREFIX}completions/clipped_ratio", ".0%"),
    ("4-gram repetition", f"{EVAL_PREFIX}completions/repetition", ".1%"),
    ("KL from base, per token", f"{EVAL_PREFIX}completions/kl", ".3f"),
)

BAR_WIDTH = 12  # columns; leaves room for the most important metrics on a terminal of 80 columns


def make_console() -> Console:
    """Return a console for stdout; colours and live updates are used only on a terminal."""
    is_plain = bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()
    return TerminalConsole(no_color=is_plain, soft_wrap=is_plain)


class TerminalConsole(Console):
    """A console on which text from outside has no effect.

    Control characters are shown as visible escapes; markup such as `[bold]` and names of emojis
    such as `:train:` are shown as they are written.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return `text` with visible control characters as text that can be styled."""
        return super().render_str(escape_controls(text), **settings)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments of a renderable; control characters are visible in all of them."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else _escape_segment(segment)


def _escape_segment(segment: Segment) -> Segment:
    return Segment(escape_controls(segment.text), segment.style)


def print_label_table(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print (label, text) pairs in two columns; a terminal wraps long texts within the column."""
    width = max([13, *(len(label) for label, _ in facts)])
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", min_width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts:
        if not console.is_terminal:
            console.print(f"{label:<{width}} {text}")
        table.add_row(label, text)
    if console.is_terminal:
        console.print(table)


def format_step(row: MetricsRow, total: int) -> str:
    """Return a training metrics row as one line of text; `total` is the run's number of steps."""
    return (
        f"step {int(row['step']):>{len(str(total))}}/{total}  loss {row['loss']:.4f}  "
        f"margin {_format_metric(row, 'rewards/margins', '+.3f')}  "
        f"accuracy {_format_accuracy(row, '', '.0%'):>4}  "
        f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s  "
        f"{row['peak_memory_gb']:.2f} GB"
    )


def format_evaluation(row: MetricsRow) -> str:
    """Return an evaluation metrics row as one line of text."""
    return (
        f"held out after step {int(row['step'])}: loss {row['eval_loss']:.4f}  "
        f"margin {_format_metric(row, 'eval_rewards/margins', '+.3f')}  "
        f"accuracy {_format_accuracy(row, EVAL_PREFIX, '.1%')}{_format_samples(row)}"
    )


def _format_samples(row: MetricsRow) -> str:
    """Return repetition and KL divergence of sampled answers; empty if none were sampled."""
    names = (("repetition", ".0%"), ("kl", ".3f"))
    texts = [
        f"{name} {row[key]:{form}}"
        for name, form in names
        if (key := f"{EVAL_PREFIX}completions/{name}") in row
    ]
    return "".join(f"  {text}" for text in texts)


NOISE = "not meaningful"  # instead of an accuracy whose margins are noise


def format_final_metrics(row: MetricsRow, *, is_noise: bool = False) -> dict[str, str]:
    """Return an evaluation's final metrics as a mapping from label to formatted number.

    With `is_noise` the margins are noise, and accuracy is not shown as a result.
    """
    formats = {"accuracy": ".1%"}
    texts = {
        label: _format_metric(row, key, formats.get(label, ".4f")) for label, key in FINAL_METRICS
    }
    texts |= {label: format(row[key], form) for label, key, form in SAMPLE_METRICS if key in row}
    return texts | {"accuracy": NOISE} if is_noise else texts


def final_metrics_table(row: MetricsRow, *, title: str, is_noise: bool = False) -> Table:
    """Return a table for the terminal with the metrics of an evaluation."""
    table = Table(title=title, title_justify="left", show_header=False, box=SIMPLE)
    table.add_column()
    table.add_column(justify="right")
    for label, value in format_final_metrics(row, is_noise=is_noise).items():
        table.add_row(label, value)
    return table


def _format_accuracy(row: MetricsRow, prefix: str, form: str) -> str:
    """Return the accuracy, or "-" if the margin is shown as zero: then there is no preference."""
    if abs(row.get(f"{prefix}rewards/margins", 1.0)) < ZERO_MARGIN:
        return "-"
    return format(row[f"{prefix}rewards/accuracies"], form)


def _format_metric(row: MetricsRow, key: str, form: str) -> str:
    """Return the metric `key` in the number format `form`, or "-" if the row does not have it.

    For example, the row has no margin if all rows of labelled data have the same label.
    """
    return format(row[key], form) if key in row else "-"


class StepDisplay(Protocol):
    """Interface of a display that shows a run's metrics rows one by one."""

    def show(self, row: MetricsRow) -> None:
        """Show the metrics row of a training step or of an evaluation."""


class PlainLines:
    """A display that prints metrics rows as plain lines, for logs and pipes."""

    def __init__(self, console: Console, total: int, every: int) -> None:
        self.console, self.total, self.every = console, total, every

    def show(self, row: MetricsRow) -> None:
        """Print a row if it is an evaluation, the last step, or a step divisible by `every`."""
        if "eval_loss" in row:
            self.console.print(format_evaluation(row))
        elif row["step"] % self.every == 0 or row["step"] == self.total:
            self.console.print(format_step(row, self.total))


class StepBar:
    """A progress bar, followed by as many metrics of the last step as fit on the line."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self.progress = progress
        self.task = progress.add_task("steps", total=total, completed=done, metrics="")
        self.bar_width = len(f"steps {total}/{total} -:--:-- ") + BAR_WIDTH + 2

    def show(self, row: MetricsRow) -> None:
        """Advance the bar to a training step, or print an evaluation above the bar."""
        if "eval_loss" in row:
            self.progress.console.print(format_evaluation(row))
            return
        metrics = [
            f"loss {row['loss']:.4f}",
            f"margin {_format_metric(row, 'rewards/margins', '+.3f')}",
            f"accuracy {_format_accuracy(row, '', '.0%')}",
            f"{row['tokens_per_second']:,.0f} tok/s",
            f"{row['peak_memory_gb']:.2f} GB",
        ]
        available = self.progress.console.width - self.bar_width  # windows may be resized
        while len(metrics) > 1 and len("  ".join(metrics)) > available:
            metrics.pop()
        self.progress.update(self.task, completed=row["step"], metrics="  ".join(metrics))


@contextmanager
def show_steps(console: Console, *, total: int, done: int, every: int) -> Iterator[StepDisplay]:
    """Yield the display of a run's steps: a progress bar on a terminal, else plain lines.

    Args:
        total: number of optimizer steps of the run.
        done: number of steps taken before a resume.
        every: number of steps from one plain line to the next.
    """
    if not console.is_terminal:
        yield PlainLines(console, total, every)
        return
    columns = [*_make_columns(total), TextColumn("{task.fields[metrics]}", markup=False)]
    with Progress(*columns, console=console) as progress:
        yield StepBar(progress, total, done)


@contextmanager
def show_progress(
    console: Console, description: str, *, total: int | None, unit: str = "pairs"
) -> Iterator["AdvanceProgress"]:
    """Yield a function that advances a progress bar; without a terminal, print one line at the end.

    Args:
        description: label of the bar.
        total: number of items; None if it is unknown.
        unit: name of the items, for the line that is printed without a terminal.
    """
    if not console.is_terminal:
        yield lambda items: None
        if total is not None:
            console.print(f"{description}: {total} {unit}")
        return
    with Progress(*_make_columns(total), console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda items: progress.advance(task, items)


class AdvanceProgress(Protocol):
    """Type of a function that advances a progress bar."""

    def __call__(self, items: int, /) -> None:
        """Advance the progress bar by this number of items."""


def _make_columns(total: int | None) -> list[ProgressColumn]:
    counter = "{task.completed}" if total is None else "{task.completed}/{task.total}"
    return [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=BAR_WIDTH),
        TextColumn(counter, markup=False),
        TimeRemainingColumn(),
    ]
