"""Bounds on what is read: kinds of files, sizes, nesting, digits and archives."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tracemalloc
from functools import partial

import pytest

from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.io import bounded
from mlx_dpo.io.bounded import (
    UnpackedStream,
    parse_json,
    read_at_most,
    read_bytes,
    read_lines,
    read_text,
)


def refusal(call, *args, **kwargs):
    with pytest.raises(ConfigError) as error:
        call(*args, ConfigError, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pipe_that_nobody_writes_to_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.yaml")
    message = refusal(read_text, tmp_path / "x.yaml")
    assert message == f"{tmp_path}/x.yaml: is a pipe; give a file"


def test_a_device_that_never_ends_is_refused(tmp_path):
    (tmp_path / "x.yaml").symlink_to("/dev/zero")
    assert refusal(read_text, tmp_path / "x.yaml").endswith("x.yaml: is a device; give a file")


def test_a_name_that_is_no_file_is_refused_with_its_reason(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert refusal(read_text, tmp_path).endswith(": is a folder; give a file")
    assert refusal(read_text, tmp_path / "none").endswith("none: no such file")
    assert refusal(read_text, tmp_path / "file" / "x").endswith("file/x: no such file")
    assert refusal(read_text, tmp_path / "loop").endswith("loop: a loop of symbolic links")
    assert refusal(read_text, tmp_path / ("n" * 300)).endswith("the name is too long for a file")
    assert "a\\0b: the name contains a NUL" in refusal(read_text, tmp_path / "a\0b")


def test_the_pipe_of_a_shell_is_read_where_it_is_accepted():
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"epochs: 2")
        os.close(write_end)
        path = bounded.PIPE_FOLDERS[0] / str(read_end)
        assert refusal(read_text, path).endswith("is a pipe; give a file")
        assert read_text(path, ConfigError, accept_pipe=True) == "epochs: 2"
    finally:
        os.close(read_end)


def test_a_file_of_the_limit_is_read_and_one_byte_more_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", ConfigError, limit=5) == b"12345"
    assert refusal(read_bytes, tmp_path / "a", limit=4).endswith(
        "a: larger than 4 bytes; give another file"
    )


def test_a_byte_order_mark_is_no_text_and_a_foreign_encoding_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfhi")
    assert read_text(tmp_path / "a", ConfigError) == "hi"
    (tmp_path / "a").write_bytes(b"h\xe9")
    assert "a: not UTF-8 (byte 0xe9 at 1)" in refusal(read_text, tmp_path / "a")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"k":', "}")])
def test_nesting_is_bounded_whatever_python_allows(opening, closing):
    def nested(depth):
        return opening * depth + "1" + closing * depth

    assert parse_json(nested(bounded.MAX_NESTING), "x", ConfigError)
    for depth in (bounded.MAX_NESTING + 1, 2_000, 1_000_000):
        assert refusal(parse_json, nested(depth), "x:3").startswith("x:3: nested too deeply")


def test_many_brackets_next_to_each_other_or_in_a_text_are_no_nesting():
    assert parse_json("[" + "[]," * 500 + "[]]", "x", ConfigError) == [[]] * 501
    assert parse_json('["' + "[" * 500 + '"]', "x", ConfigError) == ["[" * 500]


def test_a_repeated_key_is_found_among_very_many():
    keys = [*map(str, range(200_000)), "\ud83d", "\ud83d"]  # a search in all pairs takes minutes
    text = "{" + ",".join(f"{json.dumps(key)}:1" for key in keys) + "}"
    message = refusal(partial(parse_json, unique_keys=True), text, "x")
    assert message == "x: `\\ud83d` occurs twice in one object; keep one of them"


def test_an_integer_that_no_float_holds_is_refused():
    assert parse_json("-" + "9" * 300, "x", ConfigError) == -int("9" * 300)
    message = refusal(parse_json, '{"n": ' + "9" * 400 + "}", "x:2")
    assert message == "x:2: a number of 400 digits (at most 300); shorten the number"
    assert "a number of 5000 digits" in refusal(parse_json, "9" * 5000, "x")  # over Python's bound


def test_json_over_its_limit_is_refused_before_it_is_parsed():
    message = refusal(parse_json, b'"' + b"a" * 20, "x:7", limit=10)
    assert message == "x:7: longer than 10 bytes; shorten it or leave it out"


def test_a_long_line_is_cut_and_the_next_lines_have_their_own_numbers():
    stream = io.BytesIO(b"a\n" + b"b" * 25 + b"\n\nc")
    assert list(read_lines(stream, limit=8)) == [b"a\n", b"b" * 9, b"\n", b"c"]


def test_a_line_of_exactly_the_limit_is_whole():
    assert list(read_lines(io.BytesIO(b"12345678\n1234567\nx"), limit=8)) == [
        b"12345678\n", b"1234567\n", b"x",
    ]  # fmt: skip


@pytest.mark.parametrize("packer", [gzip, bz2, lzma])
def test_an_archive_of_blanks_is_refused_and_one_of_text_is_read(tmp_path, monkeypatch, packer):
    monkeypatch.setattr(bounded, "UNPACKED_FREE", 1000)
    path = tmp_path / "a"

    def unpacked(content):
        path.write_bytes(packer.compress(content))
        with packer.open(path) as stream:
            bound = UnpackedStream(stream, path, path.stat().st_size, DataError)
            return io.BufferedReader(bound).read()

    text = b" ".join(b"%d" % n for n in range(10_000))
    assert unpacked(text) == text
    with pytest.raises(DataError, match=r"a: decompresses to more than .*; decompress it"):
        unpacked(b" " * 10_000_000)


def test_the_end_of_an_archive_of_blanks_is_not_looked_for(monkeypatch, tmp_path):
    """A reader of Parquet asks for the end first."""
    monkeypatch.setattr(bounded, "UNPACKED_FREE", 1000)
    packed = gzip.compress(b" " * 10_000_000)
    stream = UnpackedStream(gzip.GzipFile(fileobj=io.BytesIO(packed)), tmp_path, 1, DataError)
    with pytest.raises(DataError, match="decompresses to more than"):
        stream.seek(0, os.SEEK_END)


def test_deep_nesting_needs_no_deep_stack():
    value: list[object] = []
    for _ in range(sys.getrecursionlimit() * 2):
        value = [value]
    with pytest.raises(DataError, match="nested too deeply"):
        bounded.check_nesting(value, "x", DataError)


def test_a_bound_far_above_the_content_reserves_no_memory():
    """A list may have 8 GB, and a process may be limited to less."""
    tracemalloc.start()
    assert read_at_most(io.BytesIO(b"abc"), 1 << 40) == b"abc"
    assert read_at_most(io.BufferedReader(io.BytesIO(b"abcdef")), 1 << 40) == b"abcdef"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_no_more_than_the_bound_is_read():
    stream = io.BytesIO(b"a" * 3_000_000)
    assert len(read_at_most(stream, 2_500_000)) == 2_500_000
    assert len(stream.read()) == 500_000
