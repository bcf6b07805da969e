"""`mlx-dpo report`: the curves of runs, as a page and a picture."""

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlx_dpo.reporting.run_page import Told


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
    from mlx_dpo.runs.reports import report as write

    told, files = write(runs, output, along)
    make_console().print(_table(told))
    for file in files:
        click.echo(f"Written to {file}", err=True)


def _table(told: "list[Told]") -> Any:
    """Figures of held-out pairs: all of one run; of several what fits, a line for each."""
    from rich.box import SIMPLE
    from rich.table import Table

    from mlx_dpo.reporting.console import CLOSING

    table = Table(title="held out", title_justify="left", box=SIMPLE)
    table.add_column()
    if len(told) == 1:
        table.add_column(told[0].name, justify="right")
        for label, value in told[0].figures.items():
            table.add_row(label, value)
        return table
    left_to_the_page = [label for label, _ in CLOSING[3:]]
    labels = [label for label in told[0].figures if label not in left_to_the_page]
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for run in told:
        table.add_row(run.name, *(run.figures[label] for label in labels))
    return table
