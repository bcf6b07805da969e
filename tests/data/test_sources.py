import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mlx_dpo.data.sources import find_sources, read_rows, resolve_held_out_source, resolve_source
from mlx_dpo.errors import ConfigError, DataError


def records(path):
    return [(row.location, row.record) for row in read_rows(path)]


def test_blank_lines_count_in_line_numbers(write):
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
    """A JSON string may contain a line separator, at which str.splitlines would split."""
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
def test_an_invalid_line_raises_an_error_with_its_location(write, line, message):
    with pytest.raises(DataError) as error:
        records(write({"a": 1}, line))
    assert str(error.value) == message


def test_an_invalid_byte_raises_an_error_with_its_location(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_bytes(b'{}\n{"a": "\xe9"}\n')
    with pytest.raises(DataError) as error:
        records(Path("pairs.jsonl"))
    assert str(error.value) == ("pairs.jsonl:2: not UTF-8 (byte 0xe9 at 7); save the file as UTF-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{}, 3]", "pairs.json[1]: expected an object, found a number"),
        (
            '[{"a": 1},\n{"a": 2}',
            "pairs.json: not JSON (Expecting ',' delimiter, line 3, column 1)",
        ),
        ('{"a": 1}\n{"a": 2', "pairs.json:2: not JSON (Expecting ',' delimiter, column 8)"),
    ],
)
def test_a_damaged_json_file_raises_an_error_with_the_place(write, text, message):
    with pytest.raises(DataError) as error:
        records(write(text, name="pairs.json"))
    assert str(error.value) == message


ROWS = [
    {"prompt": [{"role": "user", "content": "é"}], "chosen": "a", "n": 1},
    {"prompt": [{"role": "user", "content": "x\ny"}], "chosen": "b, c", "n": 2},
]
PACKED = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


def parquet(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def written(kind):
    if kind == ".parquet":
        return parquet(ROWS)
    if kind == ".json":
        return json.dumps(ROWS).encode()
    if kind == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    cells: list[list[str]] = [
        ["prompt", "chosen", "n"],
        *([json.dumps(row["prompt"]), row["chosen"], str(row["n"])] for row in ROWS),
    ]
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells]
    return "\r\n".join(quoted).encode()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_format_gives_the_same_rows_compressed_or_not(tmp_path, monkeypatch, kind, packed):
    monkeypatch.chdir(tmp_path)
    name = f"pairs{kind}{packed}"
    Path(name).write_bytes(PACKED[packed](written(kind)))
    text = kind == ".csv"  # which has no numbers
    assert [row.record for row in read_rows(Path(name))] == [
        row | {"n": str(row["n"])} if text else row for row in ROWS
    ]
    places = {".jsonl": ":1 :2", ".csv": ":2 :3"}.get(kind, "[0] [1]").split()
    assert [row.location for row in read_rows(Path(name))] == [name + place for place in places]


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_file_of_another_format_than_its_suffix_raises_an_error(
    tmp_path, monkeypatch, kind, packed
):
    monkeypatch.chdir(tmp_path)
    name = f"pairs{kind}{packed}"
    whole = PACKED[packed](written(kind) * 50)
    for data in (b"no such thing", whole[: len(whole) // 2]):
        Path(name).write_bytes(data)
        with pytest.raises(DataError, match=rf"^pairs{kind}{packed}(:\d+)?: (cannot be|not JSON)"):
            records(Path(name))


def test_the_line_of_a_csv_row_is_its_first_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").write_bytes(b'\xef\xbb\xbfprompt,chosen\n"one\ntwo",a\n\nthree,[not json\n')
    assert records(Path("pairs.csv")) == [
        ("pairs.csv:2", {"prompt": "one\ntwo", "chosen": "a"}),
        ("pairs.csv:5", {"prompt": "three", "chosen": "[not json"}),
    ]


def test_json_in_a_csv_cell_is_text_unless_it_is_messages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = '[{"role": "user", "content": "hi"}]'
    sharegpt = '[{"from": "human", "value": "hi"}]'
    cells = [turns, '{"k": 1}', '[{"k": 1}]', sharegpt, '{"thought": true}']
    with Path("pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected", "conversations", "chat_template_kwargs"])
        table.writerow(cells)
    [(_, record)] = records(Path("pairs.csv"))
    read = [json.loads(turns), '{"k": 1}', '[{"k": 1}]', json.loads(sharegpt), {"thought": True}]
    assert list(record.values()) == read


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b\n1\n", "pairs.csv:2: 1 cells under a header of 2"),
        (b"a,b\n1,2,3\n", "pairs.csv:2: 3 cells under a header of 2"),
        (b"a,a\n1,2\n", "pairs.csv:1: duplicate column name"),
        (b"a,b\n1,\xe9\n", "pairs.csv:2: not UTF-8 (byte 0xe9 at 2); save the file as UTF-8"),
        (b'a,b\n"1,2\n', "pairs.csv: cannot be read (unexpected end of data)"),
    ],
)
def test_an_invalid_csv_file_raises_an_error(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").write_bytes(data)
    with pytest.raises(DataError) as error:
        records(Path("pairs.csv"))
    assert str(error.value) == message


def test_a_huge_cell_and_a_huge_line_are_read(tmp_path):
    long = "x" * 5_000_000
    (tmp_path / "a.csv").write_text(f"chosen\n{long}\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"chosen": long}) + "\n")
    for name in ("a.csv", "a.jsonl"):
        assert records(tmp_path / name)[0][1] == {"chosen": long}


@pytest.mark.parametrize(
    ("name", "found"),
    [("pairs.txt", "`.txt`"), ("pairs", "no suffix"), ("p.gz", "`.gz`"), ("p.txt.gz", "`.txt.gz`")],
)
def test_an_unsupported_suffix_raises_an_error(write, name, found):
    path = write({}, name=name)
    write({})
    for ask in (
        lambda: records(path),
        lambda: find_sources(name),
        lambda: find_sources("pairs.jsonl", name),
    ):
        with pytest.raises(DataError) as error:
            ask()
        assert str(error.value) == (
            f"{name}: unsupported file type ({found}); use `.jsonl`, `.json`, "
            "`.parquet` or `.csv`, each also `.gz`, `.bz2`, `.xz` or `.zst`"
        )


def test_a_missing_file_raises_an_error(write):
    write({})
    for ask in (
        lambda: find_sources("none.jsonl"),
        lambda: find_sources("pairs.jsonl", "a/none.jsonl.gz"),
    ):
        with pytest.raises(DataError, match="no such file or folder; a dataset on the Hub is"):
            ask()


def folder(root, *names):
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}\n")
    return str(root)


def files(sources):
    return [path for source in sources for path in source.files]


def test_a_folder_has_a_train_file_and_the_first_held_out_file(tmp_path):
    place = folder(tmp_path, "train.jsonl", "test.jsonl", "validation.csv.gz", "other.jsonl")
    sources = find_sources(place)
    assert files(sources.train) == [tmp_path / "train.jsonl"]
    assert files(sources.valid) == [tmp_path / "validation.csv.gz"]  # before `test`


def test_a_folder_may_have_no_held_out_file(tmp_path):
    assert find_sources(folder(tmp_path, "train.json")).valid == ()


def test_shards_are_read_in_order_and_none_may_be_missing(tmp_path):
    shards = [f"data/train-0000{i}-of-00003.jsonl" for i in range(3)]
    place = folder(tmp_path, *shards, "data/test-00000-of-00001.jsonl", "README.md")
    sources = find_sources(place)
    assert files(sources.train) == [tmp_path / shard for shard in shards]
    assert files(sources.valid) == [tmp_path / "data" / "test-00000-of-00001.jsonl"]
    assert [row.location for row in sources.train[0].rows()] == [
        f"{tmp_path / s}:1" for s in shards
    ]
    (tmp_path / shards[1]).unlink()
    with pytest.raises(DataError, match="2 of the 3 files of `train` are present"):
        find_sources(place)


def test_another_split_has_its_own_held_out_split(tmp_path):
    place = folder(tmp_path, "train_sft.jsonl", "train_prefs.jsonl", "test_prefs.jsonl")
    sources = find_sources(place, split="train_prefs")
    assert files(sources.train) == [tmp_path / "train_prefs.jsonl"]
    assert files(sources.valid) == [tmp_path / "test_prefs.jsonl"]
    with pytest.raises(DataError, match="no file of the split `train`"):
        find_sources(place)


def test_a_split_of_a_file_raises_an_error(write):
    with pytest.raises(ConfigError, match="`split` has no effect: files have no splits"):
        find_sources(str(write({})), split="test")


def test_a_given_held_out_file_replaces_that_of_the_folder(tmp_path):
    place = folder(tmp_path, "train.jsonl", "valid.jsonl", "mine.jsonl")
    sources = find_sources(place, str(tmp_path / "mine.jsonl"))
    assert files(sources.valid) == [tmp_path / "mine.jsonl"]
    assert files(sources.unused_valid) == [tmp_path / "valid.jsonl"]
    assert find_sources(place, str(tmp_path / "valid.jsonl")).unused_valid == ()


def test_the_held_out_source_is_the_held_out_split_or_the_whole_file(tmp_path):
    place = folder(tmp_path, "train.jsonl")
    assert resolve_held_out_source(place).files == (tmp_path / "train.jsonl",)
    folder(tmp_path, "test.jsonl")
    assert resolve_held_out_source(place).files == (tmp_path / "test.jsonl",)
    assert resolve_held_out_source(place + "/train.jsonl").files == (tmp_path / "train.jsonl",)


def test_several_sources_keep_their_order(tmp_path):
    place = folder(tmp_path, "train.jsonl", "valid.jsonl", "more.jsonl")
    sources = find_sources([str(tmp_path / "more.jsonl"), place])
    assert files(sources.train) == [tmp_path / "more.jsonl", tmp_path / "train.jsonl"]
    assert files(sources.valid) == [tmp_path / "valid.jsonl"]


def test_a_folder_without_a_train_file_raises_an_error_with_the_expected_name(tmp_path):
    with pytest.raises(DataError) as error:
        find_sources(folder(tmp_path, "valid.jsonl"))
    assert str(error.value) == (
        f"{tmp_path}: no file of the split `train` (looked for `train.jsonl` and similar "
        "names, there and in `data`)"
    )


@pytest.mark.parametrize("other", ["train.json", "train-00000-of-00001.jsonl"])
def test_a_folder_with_two_train_files_raises_an_error(tmp_path, other):
    with pytest.raises(DataError, match=r"holds both `train.*` and `train.*`; keep one of them"):
        find_sources(folder(tmp_path, "train.jsonl", other))


class Piped(io.TextIOWrapper):
    """Standard input that is not a terminal."""


def test_standard_input_is_json_lines_and_read_once(monkeypatch):
    monkeypatch.setattr("sys.stdin", Piped(io.BytesIO(b'{"a": 1}\n\n{"a": 2}\n')))
    [source] = find_sources("-").train
    assert [(row.location, row.record) for row in source.rows()] == [
        ("-:1", {"a": 1}),
        ("-:3", {"a": 2}),
    ]
    for given in ((["-", "-"], None), ("-", "-")):
        with pytest.raises(ConfigError, match="which can be read only once"):
            find_sources(*given)


def test_a_terminal_as_standard_input_raises_an_error(monkeypatch):
    class Terminal(Piped):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal(io.BytesIO()))
    with pytest.raises(DataError, match="standard input is a terminal"):
        resolve_source("-")


def test_half_a_character_in_the_name_of_a_column_is_an_error_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"note\\ud83d": 1}\n')
    with pytest.raises(DataError) as error:
        list(read_rows(tmp_path / "a.jsonl"))
    message = "a.jsonl:2: the name of a column contains an unpaired surrogate ('note\\ud83d')"
    assert message in str(error.value)
