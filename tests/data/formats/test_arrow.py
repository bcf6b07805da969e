"""Rows of Arrow tables: nulls that Arrow fills in, and types that JSON has not."""

import datetime
import decimal
import json
import uuid

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from mlx_dpo.data.formats.arrow import to_records
from mlx_dpo.data.hf_datasets import InMemoryRows
from mlx_dpo.data.sources import read_rows
from mlx_dpo.errors import DataError


def tool(name, **properties):
    return {"name": name, "parameters": {"type": "object", "properties": properties}}


def call(name, **arguments):
    return [{"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": name, "arguments": arguments}}]}]  # fmt: skip


ROWS = [
    {"chosen": call("weather", city="Paris"), "tools": [tool("weather", city={"type": "string"})]},
    {"chosen": call("time", zone="CET"), "tools": [tool("time", zone={"enum": ["CET", None]})]},
    {"chosen": call("now"), "tools": [tool("now", at={"default": None}), tool("later")]},
]


def test_a_field_that_arrow_adds_to_a_struct_stays_absent(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    assert "zone" in json.dumps(table.to_pylist()[0])  # what Arrow makes of the row
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert [row.record for row in read_rows(tmp_path / "rows.parquet")] == ROWS


def test_a_dataset_in_memory_has_the_rows_of_its_list():
    dataset = Dataset.from_list(ROWS)
    rows = InMemoryRows.from_iterable(dataset)
    assert [row.record for row in rows.rows()] == ROWS
    assert rows.digest == InMemoryRows.from_iterable(ROWS).digest


def test_a_null_that_is_meant_changes_the_digest():
    """Otherwise the tokens of the one would be taken from the cache for the other."""
    with_null = [{"tools": [tool("f", x={"default": None})]}]
    without = [{"tools": [tool("f", x={})]}]
    digests = {InMemoryRows.from_iterable(rows).digest for rows in (with_null, without)}
    assert len(digests) == 2
    as_columns = [{"prompt": None, "chosen": [{"role": "user", "name": None}]}]
    absent = [{"chosen": [{"role": "user"}]}]
    assert len({InMemoryRows.from_iterable(rows).digest for rows in (as_columns, absent)}) == 1


def values(array):
    batch = pyarrow.RecordBatch.from_arrays([array], names=["x"])
    return [record["x"] for _, record in to_records(batch, "t", 0)]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (pyarrow.timestamp("ns"), 1, "1970-01-01T00:00:00.000000001"),
        (pyarrow.timestamp("s", tz="Europe/Paris"), 0, "1970-01-01T00:00:00Z"),
        (pyarrow.timestamp("us", tz="No/Where"), 5, "1970-01-01T00:00:00.000005Z"),
        (pyarrow.date32(), datetime.date(2020, 1, 2), "2020-01-02"),
        (pyarrow.time64("ns"), 5, "00:00:00.000000005"),
        (pyarrow.duration("ms"), 5, 5),
        (pyarrow.decimal128(9, 2), decimal.Decimal("1.50"), 1.5),
        (pyarrow.decimal128(38, 0), decimal.Decimal(10**30), 10**30),
        (pyarrow.decimal128(38, 20), decimal.Decimal("0.12345678901234567891"),
         "0.12345678901234567891"),
        (pyarrow.map_(pyarrow.string(), pyarrow.int8()), [("a", 1), ("b", None)],
         {"a": 1, "b": None}),
        (pyarrow.map_(pyarrow.int8(), pyarrow.int8()), [(1, 2)], [{"key": 1, "value": 2}]),
        (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "a", "a"),
        (pyarrow.list_(pyarrow.date32()), [datetime.date(2020, 1, 2), None], ["2020-01-02", None]),
        (pyarrow.list_(pyarrow.int8(), 2), [1, 2], [1, 2]),
        (pyarrow.large_list(pyarrow.int8()), [], []),
        (pyarrow.struct([("a", pyarrow.int8())]), {"a": None}, {}),
        (pyarrow.struct([("a", pyarrow.null())]), {"a": None}, {"a": None}),
        (pyarrow.uuid(), uuid.UUID(int=5).bytes, str(uuid.UUID(int=5))),
        (pyarrow.binary(), b"\xff", b"\xff"),
    ],
)  # fmt: skip
def test_values_become_what_json_holds(kind, value, expected):
    array = pyarrow.array([None, value, None], type=kind)
    assert values(array) == [None, expected, None]
    assert values(array[1:]) == [expected, None]  # a slice has an offset


@pytest.mark.parametrize("nested", [False, True])
def test_damaged_json_in_a_column_is_named_with_its_row(nested):
    column = pyarrow.array(["1", "[]", "{"], type=pyarrow.json_())
    if nested:  # the first list is empty, the second has two values
        ends = pyarrow.array([0, 0, 2, 3], type=pyarrow.int32())
        column = pyarrow.ListArray.from_arrays(ends, column)
    table = pyarrow.table({"c": column})
    with pytest.raises(DataError, match=r"^f\[12\]: not JSON"):
        list(to_records(table, "f", 10))


def test_json_of_the_datasets_library_is_parsed():
    array = pyarrow.array(['{"x": [1, null]}', None], type=pyarrow.json_())
    assert values(array) == [{"x": [1, None]}, None]


def test_a_table_with_a_name_twice_or_a_huge_row_is_refused(monkeypatch):
    column = pyarrow.array(["x", "y" * 1000])
    batch = pyarrow.RecordBatch.from_arrays([column, column], names=["a", "a"])
    with pytest.raises(DataError, match=r"^t: duplicate column name"):
        list(to_records(batch, "t", 0))
    monkeypatch.setattr("mlx_dpo.data.formats.arrow.MAX_ROW_BYTES", 900)
    batch = pyarrow.RecordBatch.from_arrays([column], names=["a"])
    with pytest.raises(DataError, match=r"^t\[8\]: longer than 900 bytes"):
        list(to_records(batch, "t", 7))
