"""Read and write the rows of studies: `docs/evidence/NAME.csv` and `docs/evidence/runs.csv`."""

import csv
import re
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

from scripts.studies.reporting.study import Row, Rows, Value

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "docs" / "evidence"
RUNS, MUTATIONS = FOLDER / "runs.csv", FOLDER / "mutations.csv"
DIGITS = 6  # significant digits of a number that is not an integer
# As this module writes them, so that a commit such as 0123456 or 12e3456 stays text.
INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
NUMBER = re.compile(INTEGER.pattern + r"(\.[0-9]+)?(e[+-][0-9]+)?|nan|-?inf")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a CSV file, with the columns of the first row.

    Raises:
        ValueError: a row has other columns.
    """
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _to_text(value) for name, value in row.items()})


def read_rows(path: Path) -> Rows:
    """Read rows from a CSV file; what looks like a number is one."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: _to_value(text) for name, text in row.items()} for row in csv.DictReader(file)
        ]


def as_written(rows: Iterable[Row]) -> Rows:
    """Return the rows as a reader of the CSV file gets them, rounded to its digits."""
    return [{name: _to_value(_to_text(value)) for name, value in row.items()} for row in rows]


def record_run(path: Path, run: Row) -> None:
    """Write the facts of a study's run to `path`; they replace those of its earlier run."""
    earlier = read_rows(path) if path.exists() else []
    kept = [row for row in earlier if row["study"] != run["study"]]
    write_rows(path, sorted([*kept, run], key=lambda row: str(row["study"])))


def _to_text(value: Value) -> str:
    if isinstance(value, Integral):
        return str(int(value))
    return value if isinstance(value, str) else f"{value:.{DIGITS}g}"


def _to_value(text: str) -> Value:
    if not NUMBER.fullmatch(text):
        return text
    return int(text) if INTEGER.fullmatch(text) else float(text)
