import os
import subprocess
import sys
from datetime import UTC, datetime

import mlx.core as mx
import pytest

from mlx_dpo.paths import abandoned, partial_path
from mlx_dpo.training.logps_cache import SUFFIX, UNKNOWN, entries, groups, labels, write_logps
from mlx_dpo.types import PairLogps


def stored(folder, name, pairs, *, model=None, day=1):
    """A file of the cache, last used on a day of January 2026."""
    path = folder / f"{name}.safetensors"
    said = None if model is None else labels(model, "cpu float32")
    write_logps(path, PairLogps(mx.zeros((pairs,)), mx.ones((pairs,))), said)
    used = datetime(2026, 1, day, tzinfo=UTC).timestamp()
    os.utime(path, (used, used))
    return path


def ended():
    """The number of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_files_are_grouped_by_the_model_that_said_it(tmp_path):
    sizes = [
        stored(tmp_path, name, pairs, model=model, day=day).stat().st_size
        for name, pairs, model, day in (
            ("a", 256, "org/one", 3), ("b", 10, "two", 4), ("c", 44, "org/one", 9),
        )
    ]  # fmt: skip
    one, two = groups(entries(tmp_path))
    assert (one.model, one.computed_on) == ("org/one", "cpu float32")
    assert (one.files, one.pairs, one.size) == (2, 300, sizes[0] + sizes[2])
    assert one.last_used == datetime(2026, 1, 9, tzinfo=UTC)
    assert (two.model, two.files, two.pairs) == ("two", 1, 10)
    now = datetime.now(UTC)
    assert abs((now - datetime.fromisoformat(two.first_written)).total_seconds()) < 60


def test_files_from_before_there_were_labels_are_of_an_unknown_model(tmp_path):
    stored(tmp_path, "a", 7)
    [group] = groups(entries(tmp_path))
    assert (group.model, group.computed_on, group.pairs) == (UNKNOWN, UNKNOWN, 7)
    assert group.first_written is None


def test_damaged_files_are_found_and_counted_with_no_model(tmp_path):
    stored(tmp_path, "a", 7, model="m")
    path = stored(tmp_path, "b", 7, model="m")
    path.write_bytes(path.read_bytes()[:-1])
    whole, damaged = entries(tmp_path)
    assert (whole.damaged, damaged.damaged) == (False, True)
    assert (damaged.path, damaged.pairs) == (path, 0)
    assert [group.files for group in groups([whole, damaged])] == [1]


def test_only_what_a_process_that_is_gone_left_is_abandoned(tmp_path):
    path = stored(tmp_path, "a", 7)
    mine, left = partial_path(path, os.getpid()), partial_path(path, ended())
    for partial in (mine, left):
        partial.write_bytes(b"half")
    assert abandoned(tmp_path, SUFFIX) == [left]
    assert [entry.path for entry in entries(tmp_path)] == [path]


def test_a_process_of_another_user_is_not_gone(tmp_path, monkeypatch):
    def refused(process, signal):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.kill", refused)
    partial_path(tmp_path / "a.safetensors", 1).write_bytes(b"half")
    assert abandoned(tmp_path, SUFFIX) == []


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_no_folder_and_an_empty_one_hold_nothing(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    assert entries(tmp_path / folder) == abandoned(tmp_path / folder, SUFFIX) == []
