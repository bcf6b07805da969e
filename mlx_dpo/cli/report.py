"""`mlx-dpo report`: the curves of runs, as a page and a picture."""

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlx_dpo.reporting.run_page import RunDetails


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--output", metavar="FOLDER", help="Where to write. [default: RUN, if it is alone]")
@click.option(
    "--x",
    "along",
    type=click.Choice(["step", "epoch", "tokens"]),
    default="step",
    show_default=True,
    help="What curves are drawn over.",
)
def report(runs: tuple[str, ...], output: str | None, along: str) -> None:
    """Draw what became of RUN: loss, rewards, margin, accuracy, speed and the rest.

    Writes report.html, which needs nothing else, and report.png. Several runs are laid over each
    other, with the settings in which they differ. A run that is going on is drawn as far as it is.

    \b
    mlx-dpo report run
    mlx-dpo report sweep/* --output sweep-report
    """
    from mlx_dpo.reporting.console import make_console
    from mlx_dpo.saved_runs.report import write_report as write

    details, files = write(runs, output, along)
    console = make_console()
    if len(details) == 1:
        console.print(_single_run_table(details[0]))
    else:
        _print_runs(console, details)
    for file in files:
        click.echo(f"Written to {file}", err=True)


def _empty_table() -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    return Table(title="held out", title_justify="left", box=SIMPLE)


def _single_run_table(details: "RunDetails") -> "Table":
    """Return the table of all results of one run."""
    from rich.text import Text

    table = _empty_table()
    table.add_column()
    table.add_column(Text(details.name), justify="right")
    for label, value in details.cells.items():
        table.add_row(label, value)
    return table


def _print_runs(console: "Console", details: "list[RunDetails]") -> None:
    """Print a table with one line per run; print only the names of settings that do not fit."""
    from mlx_dpo.reporting.console import FINAL_METRICS

    only_on_page = [label for label, _ in FINAL_METRICS[3:]]
    labels = [label for label in details[0].cells if label not in only_on_page]
    settings, figures = labels[: labels.index("step")], labels[labels.index("step") :]
    most, unbounded = console.width // 3, console.options.update(width=sys.maxsize)
    shown: list[str] = []
    for name in settings:
        table = _runs_table(details, [*shown, name, *figures], most)
        if console.measure(table, options=unbounded).maximum <= console.width:
            shown.append(name)
    console.print(_runs_table(details, shown + figures, most))
    if left := [name for name in settings if name not in shown]:
        click.echo(f"On the page: {', '.join(left)}", err=True)


def _runs_table(details: "list[RunDetails]", labels: list[str], most: int) -> "Table":
    from rich.text import Text

    table = _empty_table()
    table.add_column(overflow="fold", max_width=most)
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for run in details:
        table.add_row(Text(run.name), *(Text(run.cells[label]) for label in labels))
    return table
