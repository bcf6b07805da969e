"""The layouts of JSON files, told apart by their content."""

import io
import json

import pytest

from mlx_dpo.data.formats.json_rows import read_json_items
from mlx_dpo.data.inspect.raw_rows import read_raw_rows
from mlx_dpo.data.sources import read_rows, resolve_source
from mlx_dpo.errors import DataError
from mlx_dpo.io.bounded import MAX_ROW_BYTES

ROWS = [{"prompt": "Hi", "n": 1}, {"prompt": "[Ho]", "n": 2}]
LINES = "\n\n" + "\n".join(map(json.dumps, ROWS)) + "\n"
LAYOUTS = {
    "lines": LINES,
    "list": json.dumps(ROWS),
    "spread list": "\n" + json.dumps(ROWS, indent=1),
    "data": json.dumps({"data": ROWS}),
    "spread data": json.dumps({"version": 1, "data": ROWS, "tags": [{"id": 1}]}, indent=2),
    "rows": '{"rows": [\n' + json.dumps(ROWS)[1:] + "}",
    "only list": json.dumps({"any name": ROWS}),
}


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_under_either_suffix(write, name, layout):
    path = write(LAYOUTS[layout], name=name)
    places = [":3", ":4"] if layout == "lines" else ["[0]", "[1]"]
    expected = [(f"{name}{place}", row) for place, row in zip(places, ROWS, strict=True)]
    assert [(row.location, row.record) for row in read_rows(path)] == expected
    # The commands of `data` read the same rows.
    assert [
        (raw.location, raw.row.record) for raw in read_raw_rows(resolve_source(name))
    ] == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]},
        {"messages": [{"role": "user", "content": "Hi"}], "label": True},
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"prompt": "Hi", "completions": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_row_with_a_list_of_objects_is_a_row(write, row, indent):
    [found] = read_rows(write(json.dumps(row, indent=indent), name="pairs.json"))
    assert found.record == row


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"train": ROWS, "test": ROWS},
            "contains several lists of rows (found `test`, `train`); write",
        ),
        ({"prompt": {"0": "x"}, "chosen": {"0": "y"}}, "columns, not rows (`chosen` holds the"),
        ({"prompt": ["x"], "chosen": ["y"], "rejected": ["z"]}, "columns, not rows"),
    ],
)
def test_other_layouts_are_named(write, document, message):
    with pytest.raises(DataError) as error:
        list(read_rows(write(json.dumps(document, indent=1), name="pairs.json")))
    assert str(error.value).startswith(f"pairs.json: {message}")


def test_a_damaged_first_line_does_not_hide_the_others(write):
    write("[1]", '{"a": 2}', name="a.jsonl")
    write("{", '{"a": 2}', name="b.jsonl")
    for name in ("a.jsonl", "b.jsonl"):
        raw = list(read_raw_rows(resolve_source(name)))
        assert [type(item.row) is DataError for item in raw] == [True, False]
        assert raw[1].row.record == {"a": 2}
        assert raw[1].location == f"{name}:2"


def test_a_key_that_stands_twice_is_an_error_with_its_line(write):
    path = write(ROWS[0], '{"chosen": "a", "chosen": "b"}')
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert (
        str(error.value) == "pairs.jsonl:2: `chosen` occurs twice in one object; keep one of them"
    )


def test_a_row_over_the_bound_has_its_line_and_the_next_rows_are_read(write):
    path = write(ROWS[0], '{"chosen": "' + "a" * MAX_ROW_BYTES + '"}', ROWS[1])
    raw = list(read_raw_rows(resolve_source(str(path))))
    assert str(raw[1].row) == "pairs.jsonl:2: longer than 32 MB; shorten it or leave it out"
    assert [item.row.record for item in (raw[0], raw[2])] == ROWS


def test_an_empty_stream_has_no_rows():
    for content in (b"", b"\n \n"):
        assert list(read_json_items(io.BytesIO(content), "x")) == []
