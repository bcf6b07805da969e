"""Tables of the results of `mlx-dpo eval`, for the terminal, the report and the model card.

A function takes the results of a measurement as JSON values, new or stored in a run folder.
"""

from collections.abc import Callable

from mlx_dpo.reporting.evaluations.drift_tables import drift_tables
from mlx_dpo.reporting.evaluations.table import Results, ResultTable

TableMaker = Callable[[str, Results], list[ResultTable]]


def perplexity_tables(subject: str, results: Results) -> list[ResultTable]:
    """Return the table of perplexities before and after training."""
    base, aligned = results["base"], results["aligned"]
    labels = {
        "perplexity per token": "token_perplexity",
        "perplexity per byte": "byte_perplexity",
        "bits per byte": "bits_per_byte",
    }
    rows = [
        (label, f"{base[key]:.4f}", f"{aligned[key]:.4f}", _change(base[key], aligned[key]))
        for label, key in labels.items()
    ]
    title = f"Perplexity of {subject} ({results['tokens']:,} tokens)"
    return [ResultTable(title, ("base", "aligned", "change"), rows)]


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.2%}"


TABLES: dict[str, TableMaker] = {"drift": drift_tables, "perplexity": perplexity_tables}


def make_tables(measurement: str, subject: str, results: Results) -> list[ResultTable]:
    """Return the tables of a measurement's results; none for a measurement without tables."""
    maker = TABLES.get(measurement)
    return [] if maker is None else maker(subject, results)
