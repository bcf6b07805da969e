"""The file `metrics.jsonl`: one metrics row per line, in the order of steps, without repeats."""

import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from mlx_dpo.errors import RunError
from mlx_dpo.io.atomic import write_file
from mlx_dpo.types import MetricsRow

T = TypeVar("T")


class MetricsLog:
    """`metrics.jsonl` of a run, open for appending from the step at which the run resumes."""

    def __init__(self, path: Path, *, after: int = 0) -> None:
        """Keep the rows up to step `after`; the steps beyond it are computed and logged again."""
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] <= after]
        write_file(path, "".join(map(_to_line, rows)))

    def write(self, row: MetricsRow) -> MetricsRow:
        """Append a row and return it."""
        with self.path.open("a") as file:
            file.write(_to_line(row))
        return row

    def evaluation_at(self, step: int) -> MetricsRow | None:
        """Return the last evaluation row after `step`, if there is one."""
        rows = [row for row in read_metrics(self.path) if row["step"] == step]
        return next((row for row in reversed(rows) if "eval_loss" in row), None)


def _to_line(row: MetricsRow) -> str:
    return json.dumps(row) + "\n"


def read_metrics(path: Path) -> list[MetricsRow]:
    """Return the rows of a metrics file, without a last line that a crash cut off.

    Raises:
        RunError: another line is not a metrics row.
    """
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").split("\n")[:-1]
    return [_parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _parse_line(line: str, location: str) -> MetricsRow:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or "step" not in row:
        raise RunError(
            f"{location}: not a metrics row (found {line[:40]!r}); the file was changed or damaged "
            "after it was written: restore its content"
        )
    return row


def timed(items: Iterator[T]) -> Iterator[tuple[float, T]]:
    """Yield each item with the seconds that the iterator took to produce it."""
    start = perf_counter()
    for item in items:
        yield perf_counter() - start, item
        start = perf_counter()
