"""Convert Arrow tables (Parquet, `datasets.Dataset`) to rows as JSON would hold them.

Arrow gives every struct of a column the same fields: a tool call without an argument `zone` has
`zone` as null if another row's call has one. Such a null is no value, so the field is left out. A
field is kept if it is null in all rows (its type is null), as a row can only have written the null
itself; so are nulls in lists and in maps, where Arrow fills nothing in. Null columns stay, too.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import accumulate
from typing import Any

import pyarrow
import pyarrow.compute
from pyarrow import types

from mlx_dpo.errors import DataError
from mlx_dpo.io.bounded import MAX_ROW_BYTES, parse_json
from mlx_dpo.units import format_bytes

Record = dict[str, Any]


def to_records(batch: Any, name: str, start: int) -> Iterator[tuple[str, Record]]:
    """Yield location and row, as a JSON-compatible dictionary, of a `RecordBatch` or `Table`.

    Times become ISO text, decimals numbers; only bytes stay bytes, which JSON cannot hold.

    Args:
        batch: the rows.
        name: name of the source, with which locations begin.
        start: index of the first row in the source.

    Raises:
        DataError: two columns have the same name, a row is too large, or JSON in it is damaged.
    """
    names = batch.schema.names

    def locate(index: int) -> str:
        return f"{name}[{start + index}]"

    if len(set(names)) < len(names):
        raise DataError(f"{name}: duplicate column name")
    if batch.nbytes > MAX_ROW_BYTES:
        _check_sizes(batch, locate)
    columns = [_to_values(_combine(column), locate) for column in batch.columns]
    for index in range(batch.num_rows):
        values = (column[index] for column in columns)
        yield locate(index), dict(zip(names, values, strict=True))


def _combine(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column


def _check_sizes(batch: Any, locate: Callable[[int], str]) -> None:
    for index in range(batch.num_rows):
        if batch.slice(index, 1).nbytes > MAX_ROW_BYTES:
            raise DataError(
                f"{locate(index)}: longer than {format_bytes(MAX_ROW_BYTES)}; shorten it or leave "
                "it out"
            )


def _to_values(array: Any, locate: Callable[[int], str]) -> list[Any]:
    """Return the elements of an Arrow array as Python values."""
    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _extension_values(array, locate)
    if types.is_dictionary(kind):
        return _to_values(array.dictionary_decode(), locate)
    if types.is_struct(kind):
        return _struct_values(array, locate)
    if types.is_map(kind):
        pair = pyarrow.struct(
            [pyarrow.field("key", kind.key_type, nullable=False), ("value", kind.item_type)]
        )
        entries = _list_values(array.cast(pyarrow.list_(pair)), locate)
        return [None if items is None else _map_value(items) for items in entries]
    if types.is_nested(kind) and not types.is_union(kind):
        return _list_values(array, locate)
    return _scalar_values(array)


def _extension_values(array: Any, locate: Callable[[int], str]) -> list[Any]:
    name = array.type.extension_name
    if name == "arrow.json":
        return [
            None if text is None else parse_json(text, locate(index), DataError)
            for index, text in enumerate(array.storage.to_pylist())
        ]
    if name == "arrow.uuid":
        return [None if value is None else str(value) for value in array.to_pylist()]
    return _to_values(array.storage, locate)


def _struct_values(array: Any, locate: Callable[[int], str]) -> list[Any]:
    fields = [
        (field.name, types.is_null(field.type), _to_values(array.field(index), locate))
        for index, field in enumerate(array.type)
    ]
    return [
        {
            name: values[index]
            for name, is_always_null, values in fields
            if is_always_null or values[index] is not None
        }
        if is_present
        else None
        for index, is_present in enumerate(array.is_valid().to_pylist())
    ]


def _list_values(array: Any, locate: Callable[[int], str]) -> list[Any]:
    lengths = pyarrow.compute.list_value_length(array).to_pylist()

    def locate_item(index: int) -> str:
        return locate(bisect_right(list(accumulate(length or 0 for length in lengths)), index))

    items = _to_values(array.flatten(), locate_item)  # without those of lists that are null
    values: list[Any] = []
    start = 0
    for length in lengths:
        values.append(None if length is None else items[start : start + length])
        start += length or 0
    return values


def _map_value(entries: list[Record]) -> Any:
    """Return a map as a dictionary, which has text as keys, or else as a list of its entries."""
    if all(isinstance(entry["key"], str) for entry in entries):
        return {entry["key"]: entry.get("value") for entry in entries}
    return entries


def _scalar_values(array: Any) -> list[Any]:
    kind = array.type
    if types.is_timestamp(kind):
        zone = "" if kind.tz is None else "Z"
        utc = array.cast(pyarrow.timestamp(kind.unit))  # an instant with a time zone is UTC
        return [_iso_text(text, zone) for text in utc.cast(pyarrow.string()).to_pylist()]
    if types.is_date(kind) or types.is_time(kind):
        return list(array.cast(pyarrow.string()).to_pylist())
    if types.is_duration(kind):
        return list(array.cast(pyarrow.int64()).to_pylist())
    if types.is_decimal(kind):
        return [None if value is None else _decimal_value(value) for value in array.to_pylist()]
    values = list(array.to_pylist())
    return (
        [str(v) if isinstance(v, tuple) else v for v in values]
        if types.is_interval(kind)
        else values
    )


def _iso_text(text: str | None, zone: str) -> str | None:
    return None if text is None else text.replace(" ", "T", 1) + zone


def _decimal_value(value: Decimal) -> Any:
    """Return a decimal as a number if a float or an integer holds it exactly, and else as text."""
    number = int(value) if value == value.to_integral_value() else float(value)
    return number if Decimal(repr(number)) == value else str(value)
