import os
from datetime import UTC, datetime

import mlx.core as mx
import pytest

from mlx_dpo.io.atomic import abandoned_paths
from mlx_dpo.io.cache_listing import UNKNOWN
from mlx_dpo.training.logps_cache import group_by_model, labels, list_entries, write_logps
from mlx_dpo.types import PairLogps
from tests.temporary_files import ended_process, temporary_path


def stored(folder, name, pairs, *, model=None, day=1):
    """A file of the cache, last used on a day of January 2026."""
    path = folder / f"{name}.safetensors"
    model_labels = None if model is None else labels(model, "cpu float32")
    write_logps(path, PairLogps(mx.zeros((pairs,)), mx.ones((pairs,))), model_labels)
    used = datetime(2026, 1, day, tzinfo=UTC).timestamp()
    os.utime(path, (used, used))
    return path


def test_files_are_grouped_by_reference_model(tmp_path):
    sizes = [
        stored(tmp_path, name, pairs, model=model, day=day).stat().st_size
        for name, pairs, model, day in (
            ("a", 256, "org/one", 3), ("b", 10, "two", 4), ("c", 44, "org/one", 9),
        )
    ]  # fmt: skip
    entry, two = group_by_model(list_entries(tmp_path))
    assert (entry.model, entry.computed_on) == ("org/one", "cpu float32")
    assert (entry.files, entry.pairs, entry.size) == (2, 300, sizes[0] + sizes[2])
    assert entry.last_used == datetime(2026, 1, 9, tzinfo=UTC)
    assert (two.model, two.files, two.pairs) == ("two", 1, 10)
    now = datetime.now(UTC)
    assert abs((now - datetime.fromisoformat(two.first_written)).total_seconds()) < 60


def test_files_from_before_there_were_labels_are_of_an_unknown_model(tmp_path):
    stored(tmp_path, "a", 7)
    [group] = group_by_model(list_entries(tmp_path))
    assert (group.model, group.computed_on, group.pairs) == (UNKNOWN, UNKNOWN, 7)
    assert group.first_written is None


def test_damaged_files_are_counted_without_a_model(tmp_path):
    stored(tmp_path, "a", 7, model="m")
    path = stored(tmp_path, "b", 7, model="m")
    path.write_bytes(path.read_bytes()[:-1])
    whole, damaged = list_entries(tmp_path)
    assert (whole.damaged, damaged.damaged) == (False, True)
    assert (damaged.path, damaged.pairs) == (path, 0)
    assert [group.files for group in group_by_model([whole, damaged])] == [1]


def test_only_what_a_process_that_is_gone_left_is_abandoned(tmp_path):
    path = stored(tmp_path, "a", 7)
    running, left = (temporary_path(path, pid) for pid in (os.getppid(), ended_process()))
    for temporary in (running, left):
        temporary.write_bytes(b"half")
    assert abandoned_paths(tmp_path) == [left]
    assert [entry.path for entry in list_entries(tmp_path)] == [path]


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_no_folder_and_an_empty_one_hold_nothing(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    assert list_entries(tmp_path / folder) == abandoned_paths(tmp_path / folder) == []
