import json
from pathlib import Path

import pytest

from mlx_dpo.errors import DataError
from mlx_dpo.preferences.sources import find, read_rows


def records(path):
    return [(row.where, row.record) for row in read_rows(path)]


def test_lines_keep_their_numbers_past_blank_ones(write):
    path = write({"a": 1}, "", "   ", {"a": 2})
    assert records(path) == [("pairs.jsonl:1", {"a": 1}), ("pairs.jsonl:4", {"a": 2})]


def test_a_json_list_is_counted_from_zero(write):
    path = write(json.dumps([{"a": 1}, {"a": 2}]), name="pairs.json")
    assert records(path) == [("pairs.json[0]", {"a": 1}), ("pairs.json[1]", {"a": 2})]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_a_byte_order_mark_and_windows_lines_are_tolerated(tmp_path, name):
    text = '{"a": "é"}\r\n' if name.endswith("l") else '[\r\n{"a": "é"}]\r\n'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [row.record for row in read_rows(tmp_path / name)] == [{"a": "é"}]


def test_only_a_newline_ends_a_line(tmp_path):
    """A line separator may stand inside a JSON string; text mode's splitlines would cut there."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": "x\u2028y\x85z"}\n', encoding="utf-8")
    assert [row.record for row in read_rows(path)] == [{"a": "x\u2028y\x85z"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', "pairs.jsonl:2: not JSON (Expecting ',' delimiter, column 8)"),
        ("[1]", "pairs.jsonl:2: expected an object, found a list"),
        ('"a"', "pairs.jsonl:2: expected an object, found text"),
        ("null", "pairs.jsonl:2: expected an object, found null"),
        ("1.5", "pairs.jsonl:2: expected an object, found a number"),
        ("true", "pairs.jsonl:2: expected an object, found true or false"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    with pytest.raises(DataError) as error:
        records(write({"a": 1}, line))
    assert str(error.value) == message


def test_a_bad_byte_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_bytes(b'{}\n{"a": "\xe9"}\n')
    with pytest.raises(DataError) as error:
        records(Path("pairs.jsonl"))
    assert str(error.value) == ("pairs.jsonl:2: not UTF-8 (byte 0xe9 at 7); save the file as UTF-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "pairs.json: expected a list of objects, found an object; a file with one"),
        ('{"a": 1}\n{"a": 2}', "pairs.json: not JSON (Extra data, line 2, column 1)"),
        ("[{}, 3]", "pairs.json[1]: expected an object, found a number"),
    ],
)
def test_a_json_file_without_a_list_of_objects_is_refused(write, text, message):
    with pytest.raises(DataError) as error:
        records(write(text, name="pairs.json"))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "found"),
    [("pairs.csv", "`.csv`"), ("pairs", "no ending"), ("p.parquet", "`.parquet`")],
)
def test_other_endings_are_refused_by_name(write, name, found):
    path = write({}, name=name)
    for ask in (lambda: records(path), lambda: find(name), lambda: find("pairs.jsonl", name)):
        with pytest.raises(DataError) as error:
            ask()
        assert str(error.value) == (
            f"{name}: this kind of file is not read ({found}); "
            "give `.jsonl`, one object a line, or `.json`, a list of objects"
        )


def test_a_missing_file_is_refused(write):
    write({})
    for ask in (lambda: find("none.jsonl"), lambda: find("pairs.jsonl", "none.jsonl")):
        with pytest.raises(
            DataError, match=r"^none\.jsonl: no such file or folder; pairs are read from files"
        ):
            ask()


def folder(root, *names):
    for name in names:
        (root / name).write_text("{}\n")
    return str(root)


def test_a_folder_gives_its_train_file_and_the_first_held_out_one(tmp_path):
    place = folder(tmp_path, "train.jsonl", "test.jsonl", "validation.json", "other.jsonl")
    sources = find(place)
    assert sources.train == tmp_path / "train.jsonl"
    assert sources.valid == tmp_path / "validation.json"  # `validation` goes before `test`


def test_a_folder_may_have_no_held_out_file(tmp_path):
    assert find(folder(tmp_path, "train.json")).valid is None


def test_the_held_out_file_that_is_asked_for_goes_before_the_folders_own(tmp_path):
    place = folder(tmp_path, "train.jsonl", "valid.jsonl", "mine.jsonl")
    sources = find(place, str(tmp_path / "mine.jsonl"))
    assert sources.valid == tmp_path / "mine.jsonl"
    assert sources.passed_over == tmp_path / "valid.jsonl"
    assert find(place, str(tmp_path / "valid.jsonl")).passed_over is None


def test_a_folder_without_a_train_file_says_what_is_looked_for(tmp_path):
    with pytest.raises(DataError) as error:
        find(folder(tmp_path, "valid.jsonl"))
    assert str(error.value) == (
        f"{tmp_path}: no file with training pairs (looked for `train.jsonl` or `train.json`)"
    )


def test_a_folder_with_two_train_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds both `train\.jsonl` and `train\.json`"):
        find(folder(tmp_path, "train.jsonl", "train.json"))
