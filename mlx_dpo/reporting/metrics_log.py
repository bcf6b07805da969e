"""Read and write `metrics.jsonl`: one metrics row per line, in step order, without duplicates."""

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
    """The file `metrics.jsonl` of a run, to which metrics rows are appended."""

    def __init__(self, path: Path, *, after: int = 0) -> None:
        """Open the file and remove the rows after step `after`.

        A run that is resumed from step `after` computes the later steps again.
        """
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] <= after]
        write_file(path, "".join(map(_to_line, rows)))

    def write(self, row: MetricsRow) -> MetricsRow:
        """Append a metrics row to the file and return the row."""
        with self.path.open("a") as file:
            file.write(_to_line(row))
        return row

    def evaluation_at(self, step: int) -> MetricsRow | None:
        """Return the last row of an evaluation at step `step`; None if there was no evaluation."""
        rows = [row for row in read_metrics(self.path) if row["step"] == step]
        return next((row for row in reversed(rows) if "eval_loss" in row), None)


def _to_line(row: MetricsRow) -> str:
    return json.dumps(row) + "\n"


def read_metrics(path: Path) -> list[MetricsRow]:
    """Read the rows of a metrics file; a last line that a crash left incomplete is ignored.

    Raises:
        RunError: a complete line is not a metrics row.
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
    """Yield (seconds, item) for each item; the iterator took that many seconds to produce it."""
    start = perf_counter()
    for item in items:
        yield perf_counter() - start, item
        start = perf_counter()
