"""Rows beside the lines that they were written on."""

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from mlx_dpo.data.inspect.raw_rows import RawRow, read_raw_rows
from mlx_dpo.data.sources import resolve_source
from mlx_dpo.errors import DataError
from mlx_dpo.schemas.schema import Row

ODD = '{"b" : 1.50,  "a":"\\u00e9", "c": [1,2 ], "n": 1e2}'


def lines_of(name):
    return [one.to_json_line().decode() for one in read_raw_rows(resolve_source(str(name)))]


def test_a_json_line_is_kept_without_its_newline(write):
    path = write("\ufeff" + ODD + " \r", "", '{"c": "é"}')
    assert lines_of(path) == [ODD, '{"c": "é"}']
    assert [one.location for one in read_raw_rows(resolve_source(str(path)))] == [
        "pairs.jsonl:1",
        "pairs.jsonl:3",
    ]


def test_compressed_files_and_standard_input_have_lines(write, monkeypatch):
    Path(write(ODD).with_suffix(".jsonl.gz")).write_bytes(gzip.compress(ODD.encode()))
    assert lines_of("pairs.jsonl.gz") == [ODD]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ODD.encode())))
    assert lines_of("-") == [ODD]


def test_other_formats_become_equivalent_json_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"a": "é\n", "b": [1, {"c": None}]}, {"a": "\ud83d"}]
    Path("list.json").write_text(json.dumps(rows))
    found = lines_of("list.json")
    assert [json.loads(line) for line in found] == rows
    assert "é" in found[0]
    Path("table.csv").write_text('prompt,chosen\n"a\nb",c\n')
    assert lines_of("table.csv") == ['{"prompt": "a\\nb", "chosen": "c"}']


def test_an_unreadable_row_does_not_stop_the_others(write):
    found = list(read_raw_rows(resolve_source(str(write('{"a": 1}', "[1]", "{", '{"a": 2}')))))
    assert [type(one.row) for one in found] == [Row, DataError, DataError, Row]
    assert [str(one.row) for one in found[1:3]] == [
        "pairs.jsonl:2: expected an object, found a list",
        "pairs.jsonl:3: not JSON (Expecting property name enclosed in double quotes, column 2)",
    ]
    Path("list.json").write_text('[{"a": 1}, 3, {"a": 2}]')
    assert [type(one.row) for one in read_raw_rows(resolve_source("list.json"))] == [
        Row,
        DataError,
        Row,
    ]
    with pytest.raises(DataError, match=r"^pairs.jsonl:3: not JSON"):
        found[2].to_json_line()


def test_values_that_json_cannot_represent_are_an_error_with_location():
    with pytest.raises(DataError, match=r"^a\[3\]: cannot be written as JSON \(.*set"):
        RawRow("a[3]", Row({"tags": {1}}, "a[3]")).to_json_line()


def test_columns_of_bytes_are_left_out_and_named_at_any_depth():
    record = {"a": 1, "image": b"\x89", "images": [{"bytes": b"\x89"}], "b": [{"c": 2}]}
    raw = RawRow("a[3]", Row(record, "a[3]"))
    assert raw.to_json_line() == b'{"a": 1, "b": [{"c": 2}]}'
    assert raw.columns_of_bytes() == ["image", "images"]
