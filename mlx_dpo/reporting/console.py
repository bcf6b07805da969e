"""What a person sees of a run: a header, a live bar or plain lines, and a closing table."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Row = Mapping[str, float]

CLOSING = (
    ("loss", "eval_loss"),
    ("accuracy", "eval_rewards/accuracies"),
    ("margin", "eval_rewards/margins"),
    ("reward of chosen", "eval_rewards/chosen"),
    ("reward of rejected", "eval_rewards/rejected"),
    ("log-prob of chosen", "eval_logps/chosen"),
    ("log-prob of rejected", "eval_logps/rejected"),
)

BAR = 12  # cells: at 80 there is room for the figures that matter most


def make_console() -> Console:
    """Standard output; colours and live drawing only on a terminal that wants them."""
    plain = bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()
    return Console(no_color=plain, highlight=False, soft_wrap=plain)


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Lines of `name  what it is`; on a terminal, long texts are folded beside their name."""
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", min_width=10, no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts:
        if not console.is_terminal:
            console.print(f"{name:<10} {text}", markup=False)
        table.add_row(name, Text(text))
    if console.is_terminal:
        console.print(table)


def step_line(row: Row, total: int) -> str:
    """One step as a plain line."""
    return (
        f"step {int(row['step']):>{len(str(total))}}/{total}  loss {row['loss']:.4f}  "
        f"margin {_figure(row, 'rewards/margins', '+.3f')}  "
        f"accuracy {row['rewards/accuracies']:4.0%}  "
        f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s  "
        f"{row['peak_memory_gb']:.2f} GB"
    )


def evaluation_line(row: Row) -> str:
    """One evaluation as a plain line."""
    return (
        f"held out after step {int(row['step'])}: loss {row['eval_loss']:.4f}  "
        f"margin {_figure(row, 'eval_rewards/margins', '+.3f')}  "
        f"accuracy {row['eval_rewards/accuracies']:.1%}"
    )


def closing(row: Row) -> dict[str, str]:
    """The means of an evaluation, as a person reads them."""
    forms = {"accuracy": ".1%"}
    return {label: _figure(row, name, forms.get(label, ".4f")) for label, name in CLOSING}


def closing_table(row: Row, *, title: str) -> Table:
    """The means of an evaluation."""
    table = Table(title=title, title_justify="left", show_header=False, box=SIMPLE)
    table.add_column()
    table.add_column(justify="right")
    for label, value in closing(row).items():
        table.add_row(label, value)
    return table


def _figure(row: Row, name: str, form: str) -> str:
    """A value; a set of judged answers may have none, for want of good or of bad ones."""
    return format(row[name], form) if name in row else "-"


class Steps(Protocol):
    """Somewhere to show steps."""

    def show(self, row: Row) -> None:
        """Show a row of metrics, of a step or of an evaluation."""


class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self, console: Console, total: int, every: int) -> None:
        self.console, self.total, self.every = console, total, every

    def show(self, row: Row) -> None:
        """Print every so many steps, the last one, and every evaluation."""
        if "eval_loss" in row:
            self.console.print(evaluation_line(row))
        elif row["step"] % self.every == 0 or row["step"] == self.total:
            self.console.print(step_line(row, self.total))


class Bar:
    """A live bar with the figures of the last step beside it, as many as there is room for."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self.progress = progress
        self.task = progress.add_task("steps", total=total, completed=done, figures="")
        self.beside = len(f"steps {total}/{total} -:--:-- ") + BAR + 2

    def show(self, row: Row) -> None:
        """Move the bar, or print an evaluation above it."""
        if "eval_loss" in row:
            self.progress.console.print(evaluation_line(row))
            return
        figures = [
            f"loss {row['loss']:.4f}",
            f"margin {_figure(row, 'rewards/margins', '+.3f')}",
            f"accuracy {row['rewards/accuracies']:.0%}",
            f"{row['tokens_per_second']:,.0f} tok/s",
            f"{row['peak_memory_gb']:.2f} GB",
        ]
        room = self.progress.console.width - self.beside  # of now: windows are resized
        while len(figures) > 1 and len("  ".join(figures)) > room:
            figures.pop()
        self.progress.update(self.task, completed=row["step"], figures="  ".join(figures))


@contextmanager
def showing_steps(console: Console, *, total: int, done: int, every: int) -> Iterator[Steps]:
    """A bar on a terminal, lines elsewhere."""
    if not console.is_terminal:
        yield Lines(console, total, every)
        return
    columns = [*_columns(total), TextColumn("{task.fields[figures]}")]
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, total, done)


@contextmanager
def counting(
    console: Console, what: str, *, total: int | None, unit: str = "pairs"
) -> Iterator["Count"]:
    """A bar that counts on a terminal, one line elsewhere; `total` None: nobody knows it."""
    if not console.is_terminal:
        yield lambda more: None
        if total is not None:
            console.print(f"{what}: {total} {unit}")
        return
    with Progress(*_columns(total), console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda more: progress.advance(task, more)


class Count(Protocol):
    """Told how many further pairs are done."""

    def __call__(self, more: int, /) -> None:
        """So many more."""


def _columns(total: int | None) -> list[ProgressColumn]:
    counted = "{task.completed}" if total is None else "{task.completed}/{task.total}"
    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=BAR),
        TextColumn(counted),
        TimeRemainingColumn(),
    ]
