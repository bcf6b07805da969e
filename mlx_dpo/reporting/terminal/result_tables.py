"""Results of `mlx-dpo eval` as tables for the terminal."""

from rich.box import SIMPLE
from rich.table import Table

from mlx_dpo.reporting.evaluations.table import ResultTable


def to_rich_table(table: ResultTable) -> Table:
    """Return a table of results for the terminal, with numbers on the right."""
    shown = Table(title=table.title, title_justify="left", box=SIMPLE)
    shown.add_column()
    for heading in table.columns:
        shown.add_column(heading, justify="right")
    for row in table.rows:
        shown.add_row(*row)
    return shown
