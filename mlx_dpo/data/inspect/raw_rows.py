"""Read rows with their original lines, including unreadable rows, and write rows unchanged."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.files import READERS, file_format, open_data_file, to_rows
from mlx_dpo.data.formats.json_rows import read_json_items
from mlx_dpo.data.sources import STDIN, Source
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.io.atomic import atomic_file
from mlx_dpo.schemas.schema import Row

JSON_LINES = ".jsonl"
JSON_FORMATS = (JSON_LINES, ".json")


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as read from its source: parsed, or with the error that makes it unreadable."""

    location: str
    row: Row | DataError
    line: bytes | None = None  # the line itself, if the source has JSON lines

    def columns_of_bytes(self) -> list[str]:
        """Return the names of columns that hold bytes, such as images; JSON cannot hold them."""
        if self.line is not None or isinstance(self.row, DataError):
            return []
        return [name for name, value in self.row.record.items() if _holds_bytes(value)]

    def to_json_line(self) -> bytes:
        """Return the row as one line of JSON without a newline; an original line is unchanged.

        Columns that hold bytes are left out.

        Raises:
            DataError: the row cannot be read, or JSON cannot represent it.
        """
        if isinstance(self.row, DataError):
            raise self.row
        if self.line is not None:
            return self.line
        left_out = self.columns_of_bytes()
        record = {name: v for name, v in self.row.record.items() if name not in left_out}
        try:
            return json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can only escape
            return json.dumps(record).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{self.location}: cannot be written as JSON ({error})") from error


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes)


def read_raw_rows(source: Source) -> Iterator[RawRow]:
    """Yield every row of a source; an unreadable row has its `DataError` instead of a `Row`.

    Raises:
        DataError: the source cannot be read to its end.
    """
    if source.dataset is not None or source.memory is not None:
        for row in source.rows():
            yield RawRow(row.location, row)
    for path in source.files:
        yield from _read_file(path)
    if source.name == STDIN:
        yield from _read_json(sys.stdin.buffer, STDIN)


def _read_file(path: Path) -> Iterator[RawRow]:
    extension, _ = file_format(path)
    with open_data_file(path) as stream:
        if extension in JSON_FORMATS:
            yield from _read_json(stream, str(path))
            return
        for location, item in READERS[extension](stream, str(path)):
            yield _to_raw_row(location, item, None)


def _read_json(stream: IO[bytes], name: str) -> Iterator[RawRow]:
    for location, value, line in read_json_items(stream, name):
        yield _to_raw_row(location, value, line)


def _to_raw_row(location: str, value: Any, line: bytes | None) -> RawRow:
    try:
        [row] = to_rows(iter([(location, value)]))
    except DataError as error:
        return RawRow(location, error)
    return RawRow(location, row, line)


def read_all_raw_rows(sources: Sequence[Source]) -> Iterator[RawRow]:
    """Yield every row of every source, in order."""
    for source in sources:
        yield from read_raw_rows(source)


def write_row(stream: IO[bytes], raw: RawRow) -> list[str]:
    """Write a row to the stream as a line of JSON; an original JSON line is copied.

    Returns:
        Names of the columns that were left out, because they hold bytes.
    """
    stream.write(raw.to_json_line() + b"\n")
    return raw.columns_of_bytes()


def check_rereadable(sources: Sequence[Source]) -> None:
    """Raise `ConfigError` if a source is standard input, which can be read only once."""
    if any(source.name == STDIN for source in sources):
        raise ConfigError(
            "`-` (standard input) can be read only once, and this command reads "
            "rows twice; give a file"
        )


def check_rows_independent(config: DPOConfig) -> None:
    """Raise `ConfigError` if `pair_labelled` is set, which makes a pair from two rows."""
    if config.pair_labelled:
        raise ConfigError(
            "`pair_labelled` has no effect where rows are written as they are; use --loss-type kto"
        )


def check_row_count(count: int, expected: int, source: Source) -> None:
    """Raise `DataError` if a second reading of a source gave another number of rows."""
    if count != expected:
        raise DataError(f"{source.name}: changed while it was read; nothing was written")


def check_new_path(path: Path) -> None:
    """Raise `ConfigError` if the file or folder to be written already exists."""
    if path.exists():
        raise ConfigError(f"{path}: already exists; choose another path or delete it")


@contextmanager
def open_new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for writing; it appears at `path` only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        yield stream
