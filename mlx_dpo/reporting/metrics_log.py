"""Read and write `metrics.jsonl`: one metrics row per line, in step order, without duplicates.

Each line begins with its checksum, so that a damaged line is not taken for a row.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, TypeVar

from mlx_dpo.errors import DamagedFileError, reason
from mlx_dpo.io import bounded
from mlx_dpo.io.atomic import flush, write_file
from mlx_dpo.io.checksums import check_line, damaged, to_checked_line
from mlx_dpo.io.write_errors import name_file
from mlx_dpo.types import MetricsRow

T = TypeVar("T")
MAX_BYTES = 4_000_000_000  # of a metrics file; a row has about 600


class MetricsLog:
    """The file `metrics.jsonl` of a run, to which metrics rows are appended."""

    def __init__(self, path: Path, *, after: int = 0) -> None:
        """Open the file and remove the rows after step `after`.

        A run that is resumed from step `after` computes the later steps again.
        """
        self.path = path
        rows = [row for row in undamaged_rows(path)[0] if row["step"] <= after]
        self.num_rows = len(rows)
        write_file(path, "".join(map(to_checked_line, rows)))

    def write(self, row: MetricsRow) -> MetricsRow:
        """Append a metrics row to the file and return the row."""
        with name_file(self.path), self.path.open("a") as file:
            file.write(to_checked_line(row))
        self.num_rows += 1
        return row

    def flush(self) -> int:
        """Wait until all rows are on the disk, and return their number."""
        flush(self.path)
        return self.num_rows

    def evaluation_at(self, step: int) -> MetricsRow | None:
        """Return the last row of an evaluation at step `step`; None if there was no evaluation."""
        rows = [row for row in read_metrics(self.path) if row["step"] == step]
        return next((row for row in reversed(rows) if "eval_loss" in row), None)


def read_metrics(path: Path, *, num_rows: int = 0) -> list[MetricsRow]:
    """Read the rows of a metrics file; a last line that a crash left incomplete is ignored.

    Args:
        num_rows: Number of rows that the file must have at least.

    Raises:
        DamagedFileError: a complete line is not the row that was written, or rows are missing.
    """
    rows, damage = undamaged_rows(path)
    if damage is not None:
        raise damage
    if len(rows) < num_rows:
        raise damaged(path, f"{len(rows)} of {num_rows} rows are left")
    return rows


def undamaged_rows(path: Path) -> tuple[list[MetricsRow], DamagedFileError | None]:
    """Return the rows before the first damaged line of a metrics file, and the damage, if any."""
    rows: list[MetricsRow] = []
    if not os.path.lexists(path):
        return [], None
    try:
        text = bounded.read_bytes(path, DamagedFileError, limit=MAX_BYTES).decode(errors="replace")
    except DamagedFileError as error:
        return [], error
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if (row := _parse_line(line)) is None:
            return rows, damaged(f"{path}:{number}", f"not a metrics row: {line[:40]!r}")
        rows.append(row)
    return rows, None


class MetricsTail:
    """Reader of a metrics file that another process writes: every row is read once.

    A resumed run rewrites its file. The rows are then read from the beginning, and `generation`
    is one higher.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        self.damage: DamagedFileError | None = None  # after the last row that can be read
        self._num_bytes = 0
        self._num_lines = 0
        self._last_line = b""

    def read_new(self) -> list[MetricsRow]:
        """Return the rows that were written since the last call, or all rows of a new generation.

        A last line that is not complete yet is left for the next call.
        """
        try:
            with self.path.open("rb") as file:
                if not self._continues(file):
                    self._start_over()
                file.seek(self._num_bytes)
                text = file.read(MAX_BYTES)
        except FileNotFoundError:
            if self._num_bytes:
                self._start_over()
            return []
        except OSError as error:
            self.damage = DamagedFileError(f"{self.path}: cannot be read ({reason(error)})")
            return []
        return self._parse(text[: text.rfind(b"\n") + 1])

    def _continues(self, file: BinaryIO) -> bool:
        """Return whether the last line that was read is still in its place."""
        file.seek(self._num_bytes - len(self._last_line))
        return file.read(len(self._last_line)) == self._last_line

    def _start_over(self) -> None:
        self.generation += 1
        self._num_bytes, self._num_lines, self._last_line = 0, 0, b""

    def _parse(self, text: bytes) -> list[MetricsRow]:
        rows = []
        self.damage = None
        for line in text.splitlines(keepends=True):
            if (row := _parse_line(line.decode(errors="replace")[:-1])) is None:
                where = f"{self.path}:{self._num_lines + 1}"
                self.damage = damaged(where, "not a metrics row")
                break
            rows.append(row)
            self._num_bytes += len(line)
            self._num_lines += 1
            self._last_line = line
        return rows


def _parse_line(line: str) -> MetricsRow | None:
    """Return the row in a line, or None if the line is damaged."""
    try:
        row = bounded.parse_json(check_line(line) or "", "", DamagedFileError)
    except DamagedFileError:
        return None
    if not isinstance(row, dict) or "step" not in row:
        return None
    return row if all(type(value) in (int, float) for value in row.values()) else None


def timed(items: Iterator[T]) -> Iterator[tuple[float, T]]:
    """Yield (seconds, item) for each item; the iterator took that many seconds to produce it."""
    start = perf_counter()
    for item in items:
        yield perf_counter() - start, item
        start = perf_counter()
