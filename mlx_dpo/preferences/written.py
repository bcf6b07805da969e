"""Sources -> rows beside the lines that they were written on, unreadable ones among them."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.errors import DataError
from mlx_dpo.preferences.files import READERS, kind_of_file, opened, parse, rows_of
from mlx_dpo.preferences.rows import Row
from mlx_dpo.preferences.sources import STDIN, Source

LINES = ".jsonl"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Written:
    """A row of a source, or what is wrong with it."""

    where: str
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
            raise DataError(f"{self.where}: cannot be written as JSON ({error})") from error


def written(source: Source) -> Iterator[Written]:
    """Every row of a source, in its order; one that is no object of JSON is a DataError in it.

    Raises:
        DataError: the source cannot be read on.
    """
    if source.dataset is not None:
        for row in source.dataset.rows(source.split):
            yield Written(row.where, row)
    for path in source.files:
        yield from _of_file(path)
    if source.name == STDIN:
        yield from _of_lines(sys.stdin.buffer, STDIN)


def _of_file(path: Path) -> Iterator[Written]:
    kind, _ = kind_of_file(path)
    with opened(path) as stream:
        if kind == LINES:
            yield from _of_lines(stream, str(path))
            return
        for where, item in READERS[kind](stream, str(path)):
            try:
                yield from (Written(where, row) for row in rows_of(iter([(where, item)])))
            except DataError as error:
                yield Written(where, error)


def _of_lines(stream: Iterable[bytes], name: str) -> Iterator[Written]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where, text = f"{name}:{number}", line.rstrip()
        try:
            [row] = rows_of(iter([(where, parse(text, where))]))
        except DataError as error:
            yield Written(where, error)
        else:
            yield Written(where, row, text.removeprefix(BYTE_ORDER_MARK))
