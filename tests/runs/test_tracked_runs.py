"""Runs with trackers: every metrics row once, also after `kill -9`, and nothing private."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.collect.iterative.folder import IterativeSettings
from mlx_dpo.collect.iterative.trainer import IterativeDPO
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.reporting.metrics_log import read_metrics
from mlx_dpo.trackers import TRACKERS
from tests.edited_files import read_entries, write_edited
from tests.runs.train_helper import train
from tests.trackers import tracker_readers as readers

INSTALLED = [name for name, tracker in TRACKERS.items() if find_spec(tracker.library)]
TRAIN_COMMAND = [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "train"]


def as_float32(values):
    return [(step, name, float(np.float32(value))) for step, name, value in values]


def expected_values(folder, name="tensorboard"):
    """Return the values that a tracker must have of a run folder."""
    values = sorted(readers.expected(read_metrics(folder / "metrics.jsonl")))
    return as_float32(values) if name == "tensorboard" else values


def tensorboard_values(folder):
    return sorted(readers.tensorboard(folder))


@pytest.fixture
def tracked(config):
    return replace(config, report_to=("tensorboard",), eval_steps=2)


@pytest.fixture
def offline_trackers(tmp_path, monkeypatch):
    """Keep the trackers offline and their files in the test's folder."""
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_after_a_kill_every_tracker_has_every_row_once(settings, offline_trackers, tmp_path):
    flags = {"batch_size": 2, "epochs": 6, "save_steps": 5, "eval_steps": 4}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in (settings | flags).items() if k != "pairs"]
    trackers = [f"--report-to={name}" for name in INSTALLED]
    folder = tmp_path / "run"

    def start(*more):
        return subprocess.Popen(
            [*TRAIN_COMMAND, settings["pairs"], *words, *more], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    first = start(*trackers)
    for line in first.stdout:
        if line.startswith("step  8/"):
            first.kill()
    first.communicate()
    assert first.returncode == -9
    run_id = json.loads((folder / "run.json").read_text())["id"]
    second = start("--resume")
    output, errors = second.communicate()
    assert second.returncode == 0, errors
    assert all(line.startswith("Warning: steps ") for line in errors.splitlines()), errors
    assert [line.split()[1] for line in output.splitlines() if line.startswith("logging")] == [
        f"{name}:" for name in INSTALLED
    ]
    assert json.loads((folder / "run.json").read_text())["id"] == run_id
    for name in INSTALLED:
        values = sorted(getattr(readers, name)(folder))
        assert values == expected_values(folder, name), name


def test_a_tracker_added_on_resume_gets_the_whole_run(config, tracked, tmp_path):
    train(config, stop_after=3)
    trainer, _ = train(tracked, resume=True)
    assert tensorboard_values(tmp_path / "run") == expected_values(tmp_path / "run")
    assert trainer.trackers.trackers == []


def test_none_stops_logging_on_resume(tracked, config, tmp_path):
    train(tracked, stop_after=3)
    before = tensorboard_values(tmp_path / "run")
    train(replace(config, report_to=("none",)), resume=True)
    assert tensorboard_values(tmp_path / "run") == before


@pytest.mark.parametrize(("error", "completed"), [(None, True), (ValueError, False)])
def test_trackers_learn_whether_the_run_was_interrupted(tracked, monkeypatch, error, completed):
    closed = []
    tracker = TRACKERS["tensorboard"]
    original_close = tracker.close

    def close(self, *, completed):
        closed.append(completed)
        original_close(self, completed=completed)

    monkeypatch.setattr(tracker, "close", close)
    with nullcontext() if error is None else pytest.raises(error), DPOTrainer(tracked) as trainer:
        trainer.prepare()
        next(trainer.steps())
        if error is not None:
            raise error
    assert closed == [completed]


def test_a_tracker_does_not_change_the_weights(config, tracked, tmp_path):
    from tests.runs.train_helper import weights

    train(replace(config, eval_steps=2))
    other = replace(tracked, output=str(tmp_path / "other"))
    train(other)
    for name, value in weights(config).items():
        assert (value == weights(other)[name]).all(), name


def test_settings_are_logged_without_paths(tracked, tmp_path):
    train(tracked)
    [file] = (tmp_path / "run" / "tensorboard").iterdir()
    data = file.read_bytes()
    assert b'"learning_rate": 0.001' in data
    assert b'"lora_r": 4' in data
    assert str(tmp_path).encode() not in data
    assert b"pairs.jsonl" not in data


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # tensorboardX leaves such a file open
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_tracker_with_a_full_disk_does_not_end_the_run(tracked, tmp_path):
    """The descriptor of its open file is replaced by one of /dev/full."""
    with DPOTrainer(tracked) as trainer:
        trainer.prepare()
        rows = []
        for row in trainer.steps():
            rows.append(row)
            if row["step"] == 2 and "eval_loss" not in row:
                [file] = (tmp_path / "run" / "tensorboard").iterdir()
                descriptors = Path("/proc/self/fd").iterdir()
                [handle] = [int(fd.name) for fd in descriptors if fd.exists() and fd.samefile(file)]
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, handle)
                os.close(full)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == rows
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "finished"
    assert trainer.trackers.warnings == [
        "tensorboard: logging stopped at step 2 (No space left on device); the run continues, "
        "and metrics.jsonl has every row"
    ]


def test_an_interrupted_run_closes_its_trackers(tracked, tmp_path):
    with pytest.raises(KeyboardInterrupt), DPOTrainer(tracked) as trainer:
        trainer.prepare()
        for row in trainer.steps():
            if row["step"] == 2:
                raise KeyboardInterrupt
    assert trainer.trackers.trackers == []
    assert tensorboard_values(tmp_path / "run") == expected_values(tmp_path / "run")


def test_a_missing_library_is_reported_before_anything_is_read(tracked, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    missing = replace(tracked, pairs="missing.jsonl", model="missing")
    remedy = r"pip install 'mlx-dpo\[tensorboard\]'"
    with pytest.raises(ConfigError, match=remedy), DPOTrainer(missing):
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_not_be_resumed_logs_nothing(tracked, tmp_path):
    train(tracked)
    before = tensorboard_values(tmp_path / "run")
    with pytest.raises(RunError, match="finished"), DPOTrainer(tracked, resume=True):
        pass
    assert tensorboard_values(tmp_path / "run") == before


def test_every_run_has_an_id_of_its_own(tracked, tmp_path):
    train(tracked, stop_after=1)
    train(replace(tracked, output=str(tmp_path / "other")), stop_after=1)
    ids = [json.loads((tmp_path / n / "run.json").read_text())["id"] for n in ("run", "other")]
    assert len(set(ids)) == 2


def test_a_record_without_an_id_gets_an_id(tracked, tmp_path):
    train(tracked, stop_after=1)
    path = tmp_path / "run" / "run.json"
    record = read_entries(path)
    del record["id"]
    write_edited(path, record)
    train(tracked, resume=True)
    assert len(json.loads(path.read_text())["id"]) == 16


def test_the_rounds_of_a_loop_have_names_of_their_own(config, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("One?\nTwo?\n")
    (tmp_path / "rewards.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    monkeypatch.setattr("mlx_dpo.collect.iterative.trainer.check_trackers", lambda config: None)
    settings = IterativeSettings(
        prompts=str(tmp_path / "prompts.txt"), reward=f"{tmp_path}/rewards.py:length"
    )
    given = {"model": config.model, "output": str(tmp_path / "loop")}
    named = IterativeDPO(DPOConfig(**given, report_to=("wandb",)), settings)
    assert [named.round_config(n).run_name for n in (1, 2)] == ["loop-round-01", "loop-round-02"]
    mine = IterativeDPO(DPOConfig(**given, report_to=("wandb",), run_name="mine"), settings)
    assert mine.round_config(2).run_name == "mine-round-02"
    folders = IterativeDPO(DPOConfig(**given, report_to=("tensorboard",)), settings)
    assert folders.round_config(2).run_name is None


def test_a_loop_checks_its_trackers_before_it_collects(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    (tmp_path / "rewards.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    settings = IterativeSettings(prompts="prompts.txt", reward=f"{tmp_path}/rewards.py:length")
    tracked = DPOConfig(model=config.model, output=str(tmp_path / "l"), report_to=("tensorboard",))
    with pytest.raises(ConfigError, match="tensorboardX"):
        IterativeDPO(tracked, settings)


def test_the_run_name_is_the_resolved_folders_name(config, monkeypatch, tmp_path):
    from mlx_dpo.runs.trackers import run_name

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_name(replace(config, output=".")) == "here"
    assert run_name(replace(config, report_to=("wandb",), run_name="mine")) == "mine"
