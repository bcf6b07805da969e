"""A study and its claims: each claim is one number computed from the rows, and its bound."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_dpo.reporting.plots import Theme

Value = float | int | str
Row = dict[str, Value]
Rows = Sequence[Row]


@dataclass(frozen=True)
class Scale:
    """How much a run of a study computes.

    Attributes:
        quick: fewer settings, so that the study takes less than a minute.
        seeds: seeds of models, data and training.
        folder: temporary folder for checkpoints and runs.
    """

    quick: bool
    seeds: tuple[int, ...]
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about the rows of a study, with the bound that its number has to keep.

    The number is computed for each seed, from the rows with this `seed`, and every seed has to keep
    the bound; with `pooled` it is computed once, from all rows.

    Attributes:
        name: short name, unique in the study, for the command line and tests.
        text: the statement, for the page; it names the number.
        source: paper and equation or figure of the statement.
        measure: function of the rows that returns the number.
        below: the number has to be below this.
        above: the number has to be above this.
        pooled: use the rows of all seeds at once.
        unit: unit of the number, for the page.
        full_only: the rows of a quick run do not have what the claim needs.
    """

    name: str
    text: str
    source: str
    measure: Callable[[Rows], float]
    below: float = math.inf
    above: float = -math.inf
    pooled: bool = False
    unit: str = ""
    full_only: bool = False


@dataclass(frozen=True)
class Finding:
    """The measured numbers of a claim, one per seed, or one if the claim is pooled."""

    claim: Claim
    values: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether every number keeps the bound; NaN does not, nor does a claim without numbers."""
        return bool(self.values) and all(
            self.claim.above < value < self.claim.below for value in self.values
        )


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of a study, drawn from its rows.

    Attributes:
        name: end of the file's name, unique in the study.
        caption: axes, units, what points and bands are; n.
        draw: function that draws the rows into an empty figure; see `figures.py`.
        size: width and height in inches.
    """

    name: str
    caption: str
    draw: Callable[["Figure", Rows, "Theme"], None]
    size: tuple[float, float] = (8.0, 3.4)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a study, computed from its rows.

    Attributes:
        name: short name, unique in the study.
        caption: what rows and columns are; units; n.
        compute: function of the rows that returns the table's rows; the first one names the
            columns, as the page shows them. Text is Markdown.
    """

    name: str
    caption: str
    compute: Callable[[Rows], Rows]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study: its question, the function that measures it, and what it claims.

    Attributes:
        name: name of its module.
        title: heading on the page.
        result: what the study found, without numbers, in at most two sentences; it answers the
            question.
        question: paragraph on the page: what is published, where, and what is asked.
        setup: paragraph on the page: model, data, settings, what is exact and what is sampled.
        run: function that yields the rows; each has a column `seed`.
        claims: statements with bounds.
        pictures: figures.
        tables: tables.
        deviations: differences from the papers, each with its reason; Markdown sentences.
        sources: papers, as Markdown.
    """

    name: str
    title: str
    result: str
    question: str
    setup: str
    run: Callable[[Scale], Iterable[Row]]
    claims: Sequence[Claim]
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    deviations: Sequence[str] = ()
    sources: Sequence[str] = ()


def check_claims(study: Study, rows: Rows, *, quick: bool = False) -> Iterator[Finding]:
    """Yield the numbers of every claim of a study, computed from the rows."""
    seeds = sorted({row["seed"] for row in rows})
    for claim in study.claims:
        if quick and claim.full_only:
            continue
        groups = [rows] if claim.pooled else [of(rows, seed=seed) for seed in seeds]
        yield Finding(claim, tuple(float(claim.measure(group)) for group in groups))


def of(rows: Rows, **values: Value) -> Rows:
    """Return the rows that have these values in these columns."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def column(rows: Rows, name: str) -> list[float]:
    """Return the numbers of a column."""
    return [float(row[name]) for row in rows]


def distinct(rows: Rows, name: str) -> list[Value]:
    """Return the distinct values of a column, in the order of the rows."""
    return list(dict.fromkeys(row[name] for row in rows))
