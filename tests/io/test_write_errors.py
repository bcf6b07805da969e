"""An error of the disk names the file and the cause, however it was found."""

import errno
import os
from pathlib import Path

import pytest

from mlx_dpo.chat.feedback import JsonlFile
from mlx_dpo.errors import DataError
from mlx_dpo.io.atomic import atomic_file, atomic_folder, write_file
from mlx_dpo.io.write_errors import ADVICE, advice_on, describe_disk_error, find_write_error

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(
    not FULL.exists(), reason="only Linux has a device that is always full"
)


def failed(number, name=None):
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize("number", ADVICE)
def test_the_cause_decides_the_advice(number):
    message = describe_disk_error(failed(number, "a/b"))
    assert message == f"a/b: {os.strerror(number)}; {ADVICE[number]}"
    assert ("free some space" in message) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_other_errors_are_no_errors_of_the_disk():
    assert describe_disk_error(failed(errno.ECONNRESET)) is None
    assert advice_on(failed(errno.ENOENT)) == "check the disk, or choose another place"


def write_to_full_disk():
    with FULL.open("w") as stream:
        stream.write("a" * 100_000)


@needs_full
def test_a_write_without_a_name_gets_the_name_of_the_target(tmp_path):
    """Only `open` knows the name of its file; `write` and `flush` do not."""
    with pytest.raises(OSError, match="No space") as error, atomic_file(tmp_path / "x.jsonl"):
        write_to_full_disk()
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_name_is_not_shown(tmp_path):
    with (
        pytest.raises(PermissionError) as error,
        atomic_folder(tmp_path / "out") as folder,
    ):
        raise failed(errno.EACCES, str(folder / "model" / "x"))
    assert error.value.filename == str(tmp_path / "out" / "model" / "x")


def test_an_error_that_is_not_of_the_disk_keeps_its_name(tmp_path):
    with pytest.raises(ConnectionResetError) as error, atomic_file(tmp_path / "x"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert error.value.filename is None


def test_a_folder_that_is_not_there_is_no_full_disk(tmp_path):
    error = find_write_error(tmp_path / "gone" / "x", "[save] Failed to open")
    assert (error.errno, error.strerror) == (errno.ENOENT, os.strerror(errno.ENOENT))


@needs_full
def test_the_cause_is_found_by_a_try(tmp_path):
    (tmp_path / "full").symlink_to(FULL)
    error = find_write_error(tmp_path / "full", "[write] Unable to write 9 bytes to file.")
    assert (error.errno, error.filename) == (errno.ENOSPC, str(tmp_path / "full"))


def test_a_try_leaves_nothing(tmp_path):
    for place in (tmp_path, tmp_path / "x"):
        error = find_write_error(place, "[write] Unable to write 9 bytes to file.")
        assert error.strerror == "[write] Unable to write 9 bytes to file"
    assert list(tmp_path.iterdir()) == []


def test_write_file_says_that_its_folder_is_gone(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "gone" / "x", "a")


@needs_full
def test_a_row_that_cannot_be_written_names_its_file(tmp_path):
    """The file is flushed once more when it is closed, outside of the block that writes."""
    (tmp_path / "rows.jsonl").symlink_to(FULL)
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be written .No space left"):
        JsonlFile(tmp_path / "rows.jsonl").append({"prompt": "a"})
