"""Locks on file systems that have none, such as network disks."""

import errno
import os

import pytest

from mlx_dpo.chat.feedback import JsonlFile
from mlx_dpo.collect.pairs_file import remove_last_line
from mlx_dpo.errors import RunError
from mlx_dpo.io.notices import notify_once
from mlx_dpo.runs.folder import RunPaths, lock_folder

CODES = ["ENOLCK", "ENOTSUP", "ENOSYS", "EIO"]


@pytest.fixture(params=CODES)
def code(request, monkeypatch):
    number = getattr(errno, request.param)

    def refused(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    notify_once.cache_clear()
    return os.strerror(number)


def test_a_run_goes_on_without_a_lock_and_says_what_is_lost(tmp_path, code, caplog):
    with lock_folder(RunPaths(tmp_path / "run")):
        (tmp_path / "run" / "run.json").write_text("{}")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/run: files cannot be locked here ({code}); a second run could write into "
        "this folder at the same time: start only one, or choose an --output on a local disk"
    ]


def test_rows_are_written_without_a_lock_and_it_is_said_once(tmp_path, code, caplog):
    file = JsonlFile(tmp_path / "rows.jsonl")
    file.append({"provenance": {"number": 1}})
    file.append({"provenance": {"number": 2}})
    remove_last_line(file.path, 2)
    assert file.path.read_text() == '{"provenance": {"number": 1}}\n'
    [record] = caplog.records
    assert f"cannot be locked here ({code}); rows of two programs" in record.message


def test_a_lock_of_another_process_is_still_an_error(tmp_path, caplog):
    with (
        lock_folder(RunPaths(tmp_path)),
        pytest.raises(RunError, match="another run is writing here"),
        lock_folder(RunPaths(tmp_path)),
    ):
        pass
    assert not caplog.records
