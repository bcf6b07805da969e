"""`mlx-dpo report`: plot the metrics of runs on an HTML page and in a PNG file."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from threading import Event
from typing import TYPE_CHECKING

import click

from mlx_dpo.cli.command import FOLDER, Command
from mlx_dpo.cli.output import echo
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mlx_dpo.reporting.run_page import RunDetails


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo report run",
        "mlx-dpo report sweep/* --output sweep-report",
        "mlx-dpo report run --live",
    ),
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=FOLDER)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    metavar="FOLDER",
    help="Folder to write; several runs need one.",
    show_default="RUN",
)
@click.option(
    "--x",
    "x_axis",
    type=click.Choice(["step", "epoch", "tokens"]),
    default="step",
    show_default=True,
    help="Quantity of the x axis.",
)
@click.option("--live", is_flag=True, help="Show RUN in the browser while it trains.")
@click.option("--no-open", is_flag=True, help="With --live: only print the page's address.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="With --live: port of the page.",
    show_default="a free one",
)
def report(
    runs: tuple[str, ...],
    output: str | None,
    x_axis: str,
    live: bool,
    no_open: bool,
    port: int | None,
) -> None:
    """Plot the metrics of RUN: loss, rewards, margin, accuracy, speed and the rest.

    Writes report.html, a self-contained page, and report.png. The curves of several runs are
    overlaid, and the settings in which the runs differ are listed. Works on unfinished runs too.

    With --live nothing is written: the page is served on this machine until Ctrl-C and updates
    itself. The run may start, stop or resume in the meantime.
    """
    if live:
        _serve_until_stopped(runs, output, x_axis, no_open, port)
        return
    for name, is_given in (("no-open", no_open), ("port", port is not None)):
        if is_given:
            raise ConfigError(f"`--{name}` has no effect without --live")
    from mlx_dpo.reporting.terminal.console import make_console
    from mlx_dpo.saved_runs.report import write_report

    details, files = write_report(runs, output, x_axis)
    console = make_console()
    if len(details) == 1:
        console.print(_single_run_table(details[0]))
    else:
        _print_comparison(console, details)
    for file in files:
        echo(f"Written to {file}", err=True)


def _serve_until_stopped(
    runs: Sequence[str], output: str | None, x_axis: str, no_open: bool, port: int | None
) -> None:
    from mlx_dpo.cli.live import serve_live_report

    if output is not None:
        raise ConfigError("`--output` has no effect with --live, which writes no files")
    with serve_live_report(runs, x_axis=x_axis, port=port or 0, open_browser=not no_open):
        echo("Ctrl-C stops it", err=True)
        with suppress(KeyboardInterrupt):
            Event().wait()
    echo("Stopped", err=True)


def _single_run_table(run: "RunDetails") -> "Table":
    """Return a table of one run with a row for each metric."""

    table = _empty_table()
    table.add_column()
    table.add_column(run.name, justify="right")
    for label, value in run.metrics.items():
        table.add_row(label, value)
    return table


def _print_comparison(console: "Console", runs: "Sequence[RunDetails]") -> None:
    """Print a table with a row for each run.

    Settings for which the console is too narrow are left out and listed below the table.
    """
    from mlx_dpo.reporting.metrics_text import FINAL_METRICS, SAMPLE_METRICS

    only_on_page = [label for label, *_ in (*FINAL_METRICS[3:], *SAMPLE_METRICS)]
    metrics = [label for label in runs[0].metrics if label not in only_on_page]
    unlimited = console.options.update(width=sys.maxsize)
    shown: list[str] = []
    for name in runs[0].settings:
        table = _comparison_table(runs, [*shown, name, *metrics], console.width)
        if console.measure(table, options=unlimited).maximum <= console.width:
            shown.append(name)
    console.print(_comparison_table(runs, shown + metrics, console.width))
    if omitted := [name for name in runs[0].settings if name not in shown]:
        echo(f"On the page: {', '.join(omitted)}", err=True)


def _comparison_table(
    runs: "Sequence[RunDetails]", labels: Sequence[str], console_width: int
) -> "Table":
    """Return a table with a row for each run and a column for each label.

    The column of run names takes at most a third of the width.
    """

    table = _empty_table()
    table.add_column(overflow="fold", max_width=console_width // 3)
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for run in runs:
        table.add_row(run.name, *(run.cells[label] for label in labels))
    return table


def _empty_table() -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    return Table(title="held out", title_justify="left", box=SIMPLE)
