"""Sources -> rows beside the lines that they were written on, unreadable ones among them."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.files import READERS, file_format, open_data_file, parse_json, to_rows
from mlx_dpo.data.sources import STDIN, Source
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.io.atomic import atomic_file
from mlx_dpo.schemas.schema import Row

LINES = ".jsonl"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Written:
    """A row of a source, or what is wrong with it."""

    location: str
    row: Row | DataError
    line: bytes | None = None  # of JSON lines, as it stands there

    def as_line(self) -> bytes:
        """The row as one line of JSON without a newline; byte for byte where it was one.

        Raises:
            DataError: it cannot be read, or holds what JSON cannot say.
        """
        if isinstance(self.row, DataError):
            raise self.row
        if self.line is not None:
            return self.line
        try:
            return json.dumps(self.row.record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
            return json.dumps(self.row.record).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{self.location}: cannot be written as JSON ({error})") from error


def written(source: Source) -> Iterator[Written]:
    """Every row of a source, in its order; one that is no object of JSON is a DataError in it.

    Raises:
        DataError: the source cannot be read on.
    """
    if source.dataset is not None or source.memory is not None:
        for row in source.rows():
            yield Written(row.location, row)
    for path in source.files:
        yield from _of_file(path)
    if source.name == STDIN:
        yield from _of_lines(sys.stdin.buffer, STDIN)


def _of_file(path: Path) -> Iterator[Written]:
    kind, _ = file_format(path)
    with open_data_file(path) as stream:
        if kind == LINES:
            yield from _of_lines(stream, str(path))
            return
        for where, item in READERS[kind](stream, str(path)):
            try:
                yield from (Written(where, row) for row in to_rows(iter([(where, item)])))
            except DataError as error:
                yield Written(where, error)


def _of_lines(stream: Iterable[bytes], name: str) -> Iterator[Written]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where, text = f"{name}:{number}", line.rstrip()
        try:
            [row] = to_rows(iter([(where, parse_json(text, where))]))
        except DataError as error:
            yield Written(where, error)
        else:
            yield Written(where, row, text.removeprefix(BYTE_ORDER_MARK))


def all_rows(sources: Sequence[Source]) -> Iterator[Written]:
    """Every row of every source, in order."""
    for source in sources:
        yield from written(source)


def write_row(stream: IO[bytes], one: Written) -> None:
    """One row as a line."""
    stream.write(one.as_line() + b"\n")


def refuse_read_once(sources: Sequence[Source]) -> None:
    """ConfigError for standard input."""
    if any(source.name == STDIN for source in sources):
        raise ConfigError("`-` can be read but once, and rows are read twice here; give a file")


def refuse_pairing(config: DPOConfig) -> None:
    """ConfigError for rows that make a pair together."""
    if config.pair_labelled:
        raise ConfigError(
            "`pair_labelled` has no effect where rows are written as they are; use --loss-type kto"
        )


def refuse_changed(found: int, before: int, source: Source) -> None:
    """DataError where a second reading had not as many rows."""
    if found != before:
        raise DataError(f"{source.name}: changed while it was read; nothing was written")


def refuse_taken(path: Path) -> None:
    """ConfigError for a place where something is already."""
    if path.exists():
        raise ConfigError(f"{path}: is there already; name another place, or remove it")


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield the stream of a new file, which is at `path` when all is written and not before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        yield stream
