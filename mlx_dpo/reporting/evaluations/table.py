"""A table of results as texts, and the values that it is made from."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Results = Mapping[str, Any]  # of one measurement, as JSON values


class ResultTable(NamedTuple):
    """A table of texts: the first column has labels, the others have numbers."""

    title: str
    columns: Sequence[str]  # headings of the columns of numbers
    rows: Sequence[Sequence[str]]  # a label, and a text per column
