"""Read rows of JSON Lines, JSON, Parquet and CSV files, also compressed; store row locations."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlx_dpo.data.formats.json_rows import read_json_items
from mlx_dpo.errors import DataError, reason
from mlx_dpo.io.bounded import UnpackedStream, decode, open_file, read_lines
from mlx_dpo.schemas import SCHEMAS
from mlx_dpo.schemas.messages import TEMPLATE_FIELDS, read_messages_in_text
from mlx_dpo.schemas.schema import Row

# A location with a canonical number, which a code can hold: `name:12` or `name[12]`.
NUMBERED = re.compile(
    r"(?P<name>.*)(?::(?P<line>0|[1-9]\d{0,9})|\[(?P<index>0|[1-9]\d{0,9})\])", re.S
)
LINE, INDEX, NAME_ONLY = range(3)  # kinds of locations
KIND_BITS, NUMBER_BITS = 2, 36
NO_ROW = -1  # code instead of a second row
AND = " and "  # between the locations of a pair that was made from two rows


class RowLocations:
    """Row locations such as `file:12` and `file[3]`, encoded as two 64-bit integers each.

    A code contains the index of the file name, the number of the row, and the kind of location
    (line, index or file name only). If a pair was made from two rows (`a:1 and b:2`), the second
    code is that of the second row; otherwise it is `NO_ROW`.

    The object is also a list of locations, to which `add` appends.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        """Create an empty list of locations whose file names must be in `names`.

        With None, any file name is allowed.
        """
        self._is_fixed = names is not None
        self._names = list(names or ())
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._codes = array("q")

    def encode(self, location: str) -> tuple[int, int]:
        """Return the two integers that encode a location.

        Raises:
            ValueError: file names were given, and the location begins with none of them.
        """
        if (code := self._find(location)) is not None:
            return code, NO_ROW
        for match in re.finditer(AND, location):  # file names may contain it, too
            first = self._find_or_learn(location[: match.start()])
            second = self._find_or_learn(location[match.end() :])
            if first is not None and second is not None:
                return first, second
        if self._is_fixed:
            raise ValueError(f"`{location}` is in none of {self._names}")
        if (code := self._find_or_learn(location)) is None:
            code = _pack(self._learn(location), 0, NAME_ONLY)
        return code, NO_ROW

    def decode(self, codes: Sequence[int]) -> str:
        """Return the location that `encode` encoded as the two integers `codes`."""
        first, second = codes
        location = self._format(first)
        return location if second == NO_ROW else f"{location}{AND}{self._format(second)}"

    def add(self, location: str) -> int:
        """Append a location, unless it equals the last one, and return its index."""
        codes = array("q", self.encode(location))
        if self._codes[-2:] != codes:
            self._codes += codes
        return len(self) - 1

    def __len__(self) -> int:
        return len(self._codes) // 2

    def __getitem__(self, index: int) -> str:
        return self.decode(self._codes[2 * index : 2 * index + 2])

    def _find(self, location: str) -> int | None:
        """Return the integer that encodes one row's location; None if its file name is unknown."""
        match = NUMBERED.fullmatch(location)
        if match is None or match["name"] not in self._numbers:
            return None
        kind = INDEX if match["line"] is None else LINE
        return _pack(self._numbers[match["name"]], int(match["line"] or match["index"]), kind)

    def _find_or_learn(self, location: str) -> int | None:
        match = NUMBERED.fullmatch(location)
        if match is not None and not self._is_fixed:
            self._learn(match["name"])
        return self._find(location)

    def _learn(self, name: str) -> int:
        number = self._numbers.setdefault(name, len(self._names))
        if number == len(self._names):
            self._names.append(name)
        return number

    def _format(self, code: int) -> str:
        kind = code & (1 << KIND_BITS) - 1
        number = code >> KIND_BITS & (1 << NUMBER_BITS) - 1
        name = self._names[code >> KIND_BITS + NUMBER_BITS]
        return (f"{name}:{number}", f"{name}[{number}]", name)[kind]


def _pack(file: int, number: int, kind: int) -> int:
    return (file << NUMBER_BITS | number) << KIND_BITS | kind


TABLE_BATCH_ROWS = 1000  # rows of a Parquet file that are Python objects at the same time
KNOWN_FIELDS = {name for schema in SCHEMAS.values() for name in schema.fields}
LIST_FIELDS = {*TEMPLATE_FIELDS, *(name for schema in SCHEMAS.values() for name in schema.lists)}
Items = Iterator[tuple[str, Any]]  # locations and parsed values
SUPPORTED_FORMATS = (
    "`.jsonl`, `.json`, `.parquet` or `.csv`, each also `.gz`, `.bz2`, `.xz` or `.zst`"
)


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file in their order.

    Raises:
        DataError: the file cannot be read; the message has the location.
    """
    kind, _ = file_format(path)
    with open_data_file(path) as stream:
        yield from to_rows(READERS[kind](stream, str(path)))


def to_rows(items: Items) -> Iterator[Row]:
    """Yield a `Row` for each (location, parsed value) in `items`.

    Fields with messages or lists as text are parsed, whatever the format of the file.

    Raises:
        DataError: a value is not an object (dictionary).
    """
    for location, item in items:
        if isinstance(item, DataError):
            raise item
        if not isinstance(item, dict):
            raise DataError(f"{location}: expected an object, found {_describe(item)}")
        _check_names(item, location)
        values = {name: _parse_text_field(name, value) for name, value in item.items()}
        yield Row(values, location)


def _check_names(record: dict[Any, Any], location: str) -> None:
    """Raise `DataError` if the name of a column is not text that UTF-8 can encode."""
    for name in record:
        if not isinstance(name, str):
            raise DataError(f"{location}: the name of a column must be text (found {name!r})")
        try:
            name.encode()
        except UnicodeEncodeError:  # JSON can contain half of a surrogate pair
            raise DataError(
                f"{location}: the name of a column contains an unpaired surrogate ({name!a}); "
                "fix the name"
            ) from None


def _parse_text_field(name: str, value: Any) -> Any:
    """Return the messages or the list that a text field holds; other values as they are."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{", '"'):
        return value
    if (messages := read_messages_in_text(value)) is not None:
        return messages
    return _read_objects(value) if name in LIST_FIELDS else value


def _read_objects(text: str) -> Any:
    """Return the list or object that is written in a text as JSON; the text if there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list | dict) else text


def file_format(path: Path) -> tuple[str, str]:
    """Return the format's and the compression's suffix in a file name, such as (".json", ".gz").

    The second suffix is "" if the file is not compressed.

    Raises:
        DataError: the format is not supported.
    """
    compression = path.suffix.lower() if path.suffix.lower() in DECOMPRESSORS else ""
    suffix = Path(path.stem if compression else path.name).suffix.lower()
    if suffix not in READERS:
        suffix_text = f"`{suffix}{compression}`" if suffix + compression else "no suffix"
        raise DataError(f"{path}: unsupported file type ({suffix_text}); use {SUPPORTED_FORMATS}")
    return suffix, compression


def read_json(stream: IO[bytes], name: str) -> Items:
    """Yield location and value of each row of a JSON file, however the file is laid out."""
    for location, value, _ in read_json_items(stream, name):
        yield location, value


def _read_parquet(stream: IO[bytes], name: str) -> Items:
    import pyarrow
    import pyarrow.parquet

    from mlx_dpo.data.formats.arrow import to_records

    try:
        table = pyarrow.parquet.ParquetFile(_seekable(stream))
        index = 0
        for batch in table.iter_batches(batch_size=TABLE_BATCH_ROWS):
            yield from to_records(batch, name, index)
            index += batch.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: cannot be read as Parquet ({reason(error)})") from error


def _seekable(stream: IO[bytes]) -> IO[bytes]:
    """Return the stream if it can seek, and otherwise a copy of its content in memory."""
    # A Parquet file is read from its end.
    return stream if stream.seekable() else io.BytesIO(stream.read())


def _read_csv(stream: IO[bytes], name: str) -> Items:
    """Yield location and fields of each record below the header."""
    csv.field_size_limit(sys.maxsize)  # completions may be long
    lines = csv.reader(_decode_lines(stream, name), strict=True)
    header = next(lines, [])
    if len(set(header)) < len(header):
        raise DataError(f"{name}:1: duplicate column name")
    last = lines.line_num
    for cells in lines:
        location, last = f"{name}:{last + 1}", lines.line_num
        if cells and len(cells) != len(header):
            raise DataError(f"{location}: {len(cells)} cells under a header of {len(header)}")
        if cells:
            yield location, dict(zip(header, map(_parse_cell, header, cells), strict=True))


def _parse_cell(column: str, text: str) -> Any:
    """Return the object or the list of objects in a cell of a column that no schema reads.

    Such a column may have fields that are read by their names (`--column prompt=input.question`).
    """
    if column in KNOWN_FIELDS or not text.startswith(("[", "{")):
        return text
    value = _read_objects(text)
    items = value if isinstance(value, list) else [value]
    return value if items and all(isinstance(item, dict) for item in items) else text


def _decode_lines(stream: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(read_lines(stream), start=1):
        yield decode(line, f"{name}:{number}", DataError)


def _describe(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


@contextmanager
def open_data_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a data file as a stream of bytes, which are decompressed while reading.

    Raises:
        DataError: the file does not exist, or cannot be read to its end.
    """
    _, compression = file_format(path)
    try:
        with open_file(path, DataError) as packed:
            if compression not in DECOMPRESSORS:
                yield packed
                return
            size = os.fstat(packed.fileno()).st_size
            with DECOMPRESSORS[compression](packed) as unpacked:
                yield io.BufferedReader(UnpackedStream(unpacked, path, size, DataError))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error


def _open_gzip(stream: IO[bytes]) -> Any:
    return gzip.GzipFile(fileobj=stream)


def _open_zstandard(stream: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.input_stream(stream, compression="zstd")


READERS: dict[str, Callable[[IO[bytes], str], Items]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": _open_gzip,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
