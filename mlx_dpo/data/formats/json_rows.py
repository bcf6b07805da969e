"""Read the rows of JSON files, whichever way they are laid out.

A file holds one object per line, a list of objects, or an object with one list of objects such as
`{"data": [...]}`. Its content says which, as `.json` and `.jsonl` are used for all of them.
"""

from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from typing import IO, Any, NamedTuple

from mlx_dpo.errors import DataError
from mlx_dpo.io.bounded import MAX_ROW_BYTES, parse_json, read_at_most, read_lines, skip_rest
from mlx_dpo.schemas.messages import ROLE_KEYS
from mlx_dpo.schemas.schema import format_names
from mlx_dpo.units import format_bytes

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CONTAINER_KEYS = frozenset({
    "data", "dataset", "examples", "instances", "items", "pairs", "records", "rows", "samples",
    "train",
})  # fmt: skip
MAX_DOCUMENT_BYTES = 8_000_000_000  # of a list that is parsed as a whole


class JsonItem(NamedTuple):
    """A value of a JSON file with its location, or the error that makes it unreadable."""

    location: str
    value: Any  # or a `DataError`
    line: bytes | None = None  # the line itself, if the file has one object per line


def read_json_items(stream: IO[bytes], name: str) -> Iterator[JsonItem]:
    """Yield every value of a JSON file; blank lines are skipped.

    Args:
        stream: content of the file.
        name: name of the file, with which locations begin: `name:3` for a line, `name[2]` for an
            element of a list.

    Raises:
        DataError: the file is a list or an object of several lines, and cannot be read.
    """
    head, number = b"", 0
    while not (line := stream.readline(MAX_ROW_BYTES + 1)).strip():
        if not line:
            return
        head += line[-1:]  # keeps the numbers of lines
        number += 1
    start = line.removeprefix(BYTE_ORDER_MARK).strip()
    item = _parse_line(line, f"{name}:{number + 1}")
    if start.startswith(b"[") or (
        isinstance(item.value, DataError) and start.endswith((b"{", b"["))
    ):
        yield from _document_items(head + line, stream, name)
        return
    skip_rest(stream, line)
    rows = _lines(stream, name, number + 2)
    second = next(rows, None)
    if second is None and isinstance(item.value, dict) and (found := _find_list(item.value, name)):
        yield from _list_items(found, name)
        return
    yield item
    if second is not None:
        yield second
    yield from rows


def _lines(stream: IO[bytes], name: str, start: int) -> Iterator[JsonItem]:
    for number, line in enumerate(read_lines(stream), start):
        if line.strip():
            yield _parse_line(line, f"{name}:{number}")


def _parse_line(line: bytes, location: str) -> JsonItem:
    text = line.rstrip()
    try:
        value = parse_json(text, location, DataError, unique_keys=True)
    except DataError as error:
        return JsonItem(location, error)
    return JsonItem(location, value, text.removeprefix(BYTE_ORDER_MARK))


def _document_items(head: bytes, stream: IO[bytes], name: str) -> Iterator[JsonItem]:
    """Yield the rows of a file that is one JSON value: a list, an object with one, or one row."""
    data = head + read_at_most(stream, MAX_DOCUMENT_BYTES)
    if stream.read(1):
        raise DataError(
            f"{name}: larger than {format_bytes(MAX_DOCUMENT_BYTES)}; write one object per line"
        )
    try:
        document = parse_json(data, name, DataError, limit=len(data), unique_keys=True)
    except DataError:
        lines = list(islice(_lines(BytesIO(data), name, 1), 2))
        is_open_list = data.lstrip().startswith(b"[") and isinstance(lines[0].value, DataError)
        if len(lines) > 1 and (is_open_list or not isinstance(lines[1].value, dict)):
            raise
        yield from _lines(BytesIO(data), name, 1)  # one object per line, and the first is damaged
        return
    rows = _find_list(document, name)
    yield from [JsonItem(name, document)] if rows is None else _list_items(rows, name)


def _list_items(rows: list[Any], name: str) -> Iterator[JsonItem]:
    for index, row in enumerate(rows):
        yield JsonItem(f"{name}[{index}]", row)


def _find_list(document: Any, name: str) -> list[Any] | None:
    """Return a list of rows, or the one in `{"data": [...]}`; None if the value is a row itself.

    Raises:
        DataError: the object is several such lists, or contains columns instead of rows.
    """
    if not isinstance(document, dict):
        return document if isinstance(document, list) else None
    lists = {key: value for key, value in document.items() if _is_list_of_rows(value)}
    if len(lists) > 1 and len(lists) == len(document):
        raise DataError(
            f"{name}: contains several lists of rows (found {format_names(lists)}); write each "
            "into a file "
            "of its own, such as `train.json` and `valid.json`"
        )
    found = [key for key in lists if key in CONTAINER_KEYS or len(document) == 1]
    if len(found) == 1:
        return lists[found[0]]
    if "chosen" in document and _is_column(document["chosen"]):
        raise DataError(
            f"{name}: columns, not rows (`chosen` holds the answers of all rows); write a list of "
            'objects, as pandas does with `to_json(orient="records")`'
        )
    return None


def _is_list_of_rows(value: Any) -> bool:
    """Return whether a value is a list of objects that are no messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and not ROLE_KEYS & row.keys() for row in value[:100])
    )


def _is_column(value: Any) -> bool:
    if isinstance(value, dict):
        return all(key.isdigit() for key in value) and bool(value)
    return isinstance(value, list) and all(isinstance(text, str | list) for text in value[:100])
