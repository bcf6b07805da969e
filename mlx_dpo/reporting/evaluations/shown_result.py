"""A result of `mlx-dpo eval` as texts, for the report page and the model card."""

from collections.abc import Sequence
from typing import NamedTuple

from mlx_dpo.reporting.evaluations.findings import Finding, read_findings
from mlx_dpo.reporting.evaluations.result_tables import make_tables
from mlx_dpo.reporting.evaluations.table import Results, ResultTable


class ShownResult(NamedTuple):
    """The tables and sentences of one measurement."""

    date: str  # day in UTC, such as `2026-11-30`
    tables: Sequence[ResultTable]
    findings: Sequence[Finding]


def show_result(measurement: str, subject: str, date: str, results: Results) -> ShownResult | None:
    """Return a stored result as texts; None for a measurement without tables.

    Args:
        measurement: kind of the measurement, such as `drift`.
        subject: what was measured on, as the tables are to name it.
        date: time in UTC, in ISO format.
        results: results as JSON values.
    """
    tables = make_tables(measurement, subject, results)
    if not tables:
        return None
    return ShownResult(date.partition("T")[0], tables, read_findings(results))
