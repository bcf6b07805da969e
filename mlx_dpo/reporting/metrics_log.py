"""Metrics as lines of JSON: each whole, in the order of steps, without repeats after a resume."""

import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from mlx_dpo.errors import RunError
from mlx_dpo.io.atomic import write_file

Row = dict[str, float]
T = TypeVar("T")


class MetricsLog:
    """`metrics.jsonl` of a run, open at the step from which the run goes on."""

    def __init__(self, path: Path, *, after: int = 0) -> None:
        """Keep the rows up to step `after`; what a crash wrote beyond it will be written again."""
        self.path = path
        kept = [row for row in read_rows(path) if row["step"] <= after]
        write_file(path, "".join(_line(row) for row in kept))

    def write(self, row: Row) -> Row:
        """Append a row and hand it on."""
        with self.path.open("a") as file:
            file.write(_line(row))
        return row

    def evaluation_at(self, step: int) -> Row | None:
        """The evaluation after `step`, if it was written."""
        rows = [row for row in read_rows(self.path) if row["step"] == step and "eval_loss" in row]
        return rows[-1] if rows else None


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a file; a last line that a crash cut short is left out.

    Raises:
        RunError: another line is no row.
    """
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").split("\n")[:-1]
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or "step" not in row:
        raise RunError(
            f"{where}: not a row of metrics (found {line[:40]!r}); the file was changed or damaged "
            "after it was written: put back what was there"
        )
    return row


def timed(items: Iterator[T]) -> Iterator[tuple[float, T]]:
    """Each item with the seconds it took to come."""
    began = perf_counter()
    for item in items:
        yield perf_counter() - began, item
        began = perf_counter()
