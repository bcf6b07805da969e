"""Ranks other than 0 work in temporary folders, with copies of what decides over the run."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.errors import RunError
from mlx_dpo.runs.distributed import follower_folder
from mlx_dpo.runs.distributed.follower_folder import find_checkpoint, open_run_folder
from mlx_dpo.runs.distributed.peers import Peers, SharedError
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.training import checkpoint
from tests.runs.distributed.thread_ranks import run_ranks
from tests.temporary_files import ended_process, temporary_path

FACTS = [{"host": "a"}, {"host": "b"}]


@pytest.fixture
def start(tmp_path):
    """Return a function that returns the run of a rank as its trainer begins it."""
    config = DPOConfig(model="m", pairs="p", output=str(tmp_path / "run"))

    def make(ranks):
        paths = RunPaths(tmp_path / "run")
        return SimpleNamespace(
            config=config, peers=Peers(ranks, FACTS), paths=paths, resume=False, overwrite=False
        )

    return make


def test_rank_0_alone_has_the_run_folder(start, tmp_path, monkeypatch):
    name = "_find_record"
    monkeypatch.setattr(follower_folder, name, lambda run: {"id": run.paths.folder.name})

    def run(ranks):
        with open_run_folder(start(ranks)) as opened:
            opened.paths.metrics.write_text("")
            return opened.paths.folder, opened.record

    (first, record), (second, same) = run_ranks(2, run)
    assert record == same == {"id": "run"}
    assert first == tmp_path / "run"
    assert {path.name for path in first.iterdir()} == {"metrics.jsonl", ".lock"}
    assert second != first
    assert not second.exists()


def test_the_folder_of_a_killed_rank_is_removed(start, tmp_path, monkeypatch):
    monkeypatch.setattr(follower_folder, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(follower_folder, "_find_record", lambda run: None)
    left = temporary_path(tmp_path / follower_folder.NAME, ended_process())
    left.mkdir()
    (left / "metrics.jsonl").write_text("")
    used = temporary_path(tmp_path / follower_folder.NAME, os.getppid())
    used.mkdir()

    def run(ranks):
        with open_run_folder(start(ranks)):
            return [left.exists(), used.exists()]

    assert run_ranks(2, run)[1] == [False, True]


def test_a_run_folder_in_use_ends_all_ranks(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("")

    def run(ranks):
        with open_run_folder(start(ranks)):
            raise AssertionError("opened")

    first, second = run_ranks(2, run)
    assert type(first) is RunError
    assert type(second) is SharedError


def test_the_last_checkpoint_and_the_metrics_are_copied(tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(100_000)
    folders = [RunPaths(tmp_path / "0"), RunPaths(tmp_path / "1")]
    saved = checkpoint.checkpoint_path(folders[0].checkpoints, 4)
    saved.mkdir(parents=True)
    (saved / "optimizer.safetensors").write_bytes(content)
    (saved / "state.json").write_text("{}")
    folders[0].metrics.write_text("row\n")
    monkeypatch.setattr(checkpoint, "latest_undamaged", lambda folder, check: saved)

    def run(ranks):
        return find_checkpoint(ranks, folders[ranks.rank], SimpleNamespace(check_resumable=None))

    first, second = run_ranks(2, run)
    assert (first, second) == (saved, folders[1].checkpoints / saved.name)
    assert {path.name: path.read_bytes() for path in second.iterdir()} == {
        "optimizer.safetensors": content,
        "state.json": b"{}",
    }
    assert folders[1].metrics.read_text() == "row\n"


def test_a_new_run_has_nothing_to_copy(tmp_path):
    def run(ranks):
        paths = RunPaths(tmp_path / str(ranks.rank))
        return find_checkpoint(ranks, paths, SimpleNamespace(check_resumable=None))

    assert run_ranks(2, run) == [None, None]
    assert list(tmp_path.iterdir()) == []
