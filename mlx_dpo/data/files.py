"""Files -> rows: JSON lines, JSON, Parquet and CSV, each also compressed."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlx_dpo.errors import DataError, reason
from mlx_dpo.schemas.schema import Row

TABLE_BATCH_ROWS = 1000  # rows of a table that are held at once
TEXT_COLUMNS = {"prompt", "question", "instruction", "chosen", "rejected", "completion"}
ROLE_KEYS = {"role", "from"}  # one of them is in every turn
Items = Iterator[tuple[str, Any]]
SUPPORTED_FORMATS = (
    "`.jsonl`, `.json`, `.parquet` or `.csv`, each also `.gz`, `.bz2`, `.xz` or `.zst`"
)


def read_file(path: Path) -> Iterator[Row]:
    """Yield the objects of a file, in its order, each with its place.

    Raises:
        DataError: names the file, the line or index, and what was found there.
    """
    kind, _ = file_format(path)
    with open_data_file(path) as stream:
        yield from to_rows(READERS[kind](stream, str(path)))


def to_rows(items: Items) -> Iterator[Row]:
    """The items as rows.

    Raises:
        DataError: one is no object.
    """
    for where, item in items:
        if not isinstance(item, dict):
            raise DataError(f"{where}: expected an object, found {_kind(item)}")
        yield Row(item, where)


def file_format(path: Path) -> tuple[str, str]:
    """Its ending, and that of the compression around it, from the name alone.

    Raises:
        DataError: such files are not read.
    """
    packed = path.suffix.lower() if path.suffix.lower() in DECOMPRESSORS else ""
    kind = Path(path.stem if packed else path.name).suffix.lower()
    if kind not in READERS:
        found = f"`{kind}{packed}`" if kind + packed else "no ending"
        raise DataError(
            f"{path}: this kind of file is not read ({found}); give {SUPPORTED_FORMATS}"
        )
    return kind, packed


def read_json_lines(stream: Iterable[bytes], name: str) -> Items:
    """One object a line; blank lines are passed over."""
    # As bytes, so that only a newline ends a line and a bad byte is blamed on its own line.
    for number, line in enumerate(stream, start=1):
        if line.strip():
            where = f"{name}:{number}"
            yield where, parse_json(line.rstrip(), where)


def _json_list(stream: IO[bytes], name: str) -> Items:
    items = parse_json(stream.read(), name)
    if not isinstance(items, list):
        raise DataError(
            f"{name}: expected a list of objects, found {_kind(items)}; "
            "a file with one object a line must end in `.jsonl`"
        )
    for index, item in enumerate(items):
        yield f"{name}[{index}]", item


def _parquet(stream: IO[bytes], name: str) -> Items:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(_seekable(stream))
        index = 0
        for batch in table.iter_batches(batch_size=TABLE_BATCH_ROWS):
            for item in batch.to_pylist():
                yield f"{name}[{index}]", item
                index += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: cannot be read as Parquet ({reason(error)})") from error


def _seekable(stream: IO[bytes]) -> IO[bytes]:
    """A table is read from its end, which a packed stream does not have."""
    return stream if stream.seekable() else io.BytesIO(stream.read())


def _csv(stream: IO[bytes], name: str) -> Items:
    """One object a line under the header; a cell that holds JSON messages is read as such."""
    csv.field_size_limit(sys.maxsize)  # there is no reason to refuse a long answer
    lines = csv.reader(_decoded(stream, name), strict=True)
    header = next(lines, [])
    if len(set(header)) < len(header):
        raise DataError(f"{name}:1: a column stands there twice")
    last = lines.line_num
    for cells in lines:
        where, last = f"{name}:{last + 1}", lines.line_num
        if cells and len(cells) != len(header):
            raise DataError(f"{where}: {len(cells)} cells under a header of {len(header)}")
        if cells:
            yield where, dict(zip(header, map(_cell, header, cells), strict=True))


def _cell(column: str, text: str) -> Any:
    if not text.startswith(("[", "{")):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    objects = value if isinstance(value, list) else [value]
    if not objects or not all(isinstance(one, dict) for one in objects):
        return text
    # Where turns or text may stand, objects that are no turns are an answer in JSON: text.
    turns = all(ROLE_KEYS & one.keys() for one in objects)
    return value if turns or column not in TEXT_COLUMNS else text


def _decoded(stream: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        yield _text(line, f"{name}:{number}")


def _text(data: bytes, location: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DataError(
            f"{location}: not UTF-8 (byte 0x{byte:02x} at {error.start}); save the file as UTF-8"
        ) from None


def parse_json(data: bytes, location: str) -> Any:
    """The JSON value.

    Raises:
        DataError: it is none, or not UTF-8.
    """
    try:
        return json.loads(_text(data, location))
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{location}: not JSON ({error.msg}, {at}column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a deep nest
        raise DataError(f"{location}: not JSON that can be read ({reason(error)})") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


@contextmanager
def open_data_file(path: Path) -> Iterator[IO[bytes]]:
    """The file, unpacked.

    Raises:
        DataError: there is none, or it cannot be read to its end.
    """
    _, packed = file_format(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        unpack: Callable[[Path], Any] = DECOMPRESSORS.get(packed, lambda path: path.open("rb"))
        with unpack(path) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error


def _zstandard(path: Path) -> Any:
    import pyarrow

    # Only as a raw stream does it have lines.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


READERS: dict[str, Callable[[IO[bytes], str], Items]] = {
    ".jsonl": read_json_lines,
    ".json": _json_list,
    ".parquet": _parquet,
    ".csv": _csv,
}
DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
