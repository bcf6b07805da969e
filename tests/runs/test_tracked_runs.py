"""Runs that tell other programs: every row once, also after `kill -9`, and nothing private."""

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
from mlx_dpo.collect.iterative_dpo import IterativeDPO
from mlx_dpo.collect.iterative_folder import IterativeSettings
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.reporting.metrics_log import read_rows
from mlx_dpo.reporting.trackers import PROGRAMS
from tests.reporting import tracker_readers as readers
from tests.runs.train_helper import train

INSTALLED = [name for name, program in PROGRAMS.items() if find_spec(program.library)]
PROGRAM = [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "train"]


def as_float32(found):
    return [(step, name, float(np.float32(value))) for step, name, value in found]


def wanted(folder, name="tensorboard"):
    """What a program is to hold of a run folder."""
    found = sorted(readers.expected(read_rows(folder / "metrics.jsonl")))
    return as_float32(found) if name == "tensorboard" else found


def in_tensorboard(folder):
    return sorted(readers.tensorboard(folder))


@pytest.fixture
def told(config):
    return replace(config, report_to=("tensorboard",), eval_steps=2)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """What those programs keep outside of a run folder, and whether they go online."""
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_killed_and_resumed_every_program_has_every_row_once(settings, elsewhere, tmp_path):
    flags = {"batch_size": 2, "epochs": 6, "save_steps": 5, "eval_steps": 4}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in (settings | flags).items() if k != "pairs"]
    told = [f"--report-to={name}" for name in INSTALLED]
    folder = tmp_path / "run"

    def start(*more):
        return subprocess.Popen(
            [*PROGRAM, settings["pairs"], *words, *more], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    first = start(*told)
    for line in first.stdout:
        if line.startswith("step  8/"):
            first.kill()
    first.communicate()
    assert first.returncode == -9
    begun = json.loads((folder / "run.json").read_text())["id"]
    second = start("--resume")
    said, errors = second.communicate()
    assert second.returncode == 0, errors
    assert all(line.startswith("Warning: steps ") for line in errors.splitlines()), errors
    assert [line.split()[1] for line in said.splitlines() if line.startswith("told")] == [
        f"{name}:" for name in INSTALLED
    ]
    assert json.loads((folder / "run.json").read_text())["id"] == begun
    for name in INSTALLED:
        found = sorted(getattr(readers, name)(folder))
        assert found == wanted(folder, name), name


def test_a_program_that_is_told_later_is_told_all_of_it(config, told, tmp_path):
    train(config, stop_after=3)
    run, _ = train(told, resume=True)
    assert in_tensorboard(tmp_path / "run") == wanted(tmp_path / "run")
    assert run.trackers.open == []


def test_a_resumed_run_goes_on_telling_and_none_ends_it(told, config, tmp_path):
    train(told, stop_after=3)
    before = in_tensorboard(tmp_path / "run")
    train(replace(config, report_to=("none",)), resume=True)
    assert in_tensorboard(tmp_path / "run") == before


@pytest.mark.parametrize(("error", "whole"), [(None, True), (ValueError, False)])
def test_programs_hear_whether_a_run_broke_off(told, monkeypatch, error, whole):
    heard = []
    program = PROGRAMS["tensorboard"]
    end = program.close

    def close(self, *, whole):
        heard.append(whole)
        end(self, whole=whole)

    monkeypatch.setattr(program, "close", close)
    with nullcontext() if error is None else pytest.raises(error), DPOTrainer(told) as run:
        run.prepare()
        next(run.train())
        if error is not None:
            raise error
    assert heard == [whole]


def test_what_is_told_changes_nothing(config, told, tmp_path):
    from tests.runs.train_helper import weights

    train(replace(config, eval_steps=2))
    other = replace(told, output=str(tmp_path / "other"))
    train(other)
    for name, value in weights(config).items():
        assert (value == weights(other)[name]).all(), name


def test_settings_are_told_and_paths_are_not(told, tmp_path):
    train(told)
    [file] = (tmp_path / "run" / "tensorboard").iterdir()
    data = file.read_bytes()
    assert b'"learning_rate": 0.001' in data
    assert b'"lora_r": 4' in data
    assert str(tmp_path).encode() not in data
    assert b"pairs.jsonl" not in data


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # tensorboardX leaves such a file open
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_of_a_program_ends_no_run(told, tmp_path):
    """Its open file is put on a device on which nothing fits."""
    with DPOTrainer(told) as run:
        run.prepare()
        rows = []
        for row in run.train():
            rows.append(row)
            if row["step"] == 2 and "eval_loss" not in row:
                [file] = (tmp_path / "run" / "tensorboard").iterdir()
                own = Path("/proc/self/fd").iterdir()
                [handle] = [int(fd.name) for fd in own if fd.exists() and fd.samefile(file)]
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, handle)
                os.close(full)
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == rows
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "finished"
    assert run.trackers.lost == [
        "tensorboard is told nothing from step 2 on (No space left on device); the run goes on, "
        "and all is in metrics.jsonl"
    ]


def test_a_run_that_breaks_off_lets_go_of_its_programs(told, tmp_path):
    with pytest.raises(KeyboardInterrupt), DPOTrainer(told) as run:
        run.prepare()
        for row in run.train():
            if row["step"] == 2:
                raise KeyboardInterrupt
    assert run.trackers.open == []
    assert in_tensorboard(tmp_path / "run") == wanted(tmp_path / "run")


def test_a_library_that_is_missing_is_said_before_anything_is_read(told, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    nothing = replace(told, pairs="nothing.jsonl", model="nothing")
    with (
        pytest.raises(ConfigError, match=r"pip install 'mlx-dpo\[tensorboard\]'"),
        DPOTrainer(nothing),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_not_be_resumed_tells_nothing(told, tmp_path):
    train(told)
    before = in_tensorboard(tmp_path / "run")
    with pytest.raises(RunError, match="finished"), DPOTrainer(told, resume=True):
        pass
    assert in_tensorboard(tmp_path / "run") == before


def test_runs_are_told_apart_by_their_ids(told, tmp_path):
    train(told, stop_after=1)
    train(replace(told, output=str(tmp_path / "other")), stop_after=1)
    ids = [json.loads((tmp_path / n / "run.json").read_text())["id"] for n in ("run", "other")]
    assert len(set(ids)) == 2


def test_a_record_without_an_id_gets_one(told, tmp_path):
    train(told, stop_after=1)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    del record["id"]
    path.write_text(json.dumps(record))
    train(told, resume=True)
    assert len(json.loads(path.read_text())["id"]) == 16


def test_the_rounds_of_a_loop_have_names_of_their_own(config, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("One?\nTwo?\n")
    (tmp_path / "rewards.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    monkeypatch.setattr("mlx_dpo.collect.iterative_dpo.check_trackers", lambda config: None)
    settings = IterativeSettings(
        prompts=str(tmp_path / "prompts.txt"), reward=f"{tmp_path}/rewards.py:length"
    )
    given = {"model": config.model, "output": str(tmp_path / "loop")}
    named = IterativeDPO(DPOConfig(**given, report_to=("wandb",)), settings)
    assert [named.training(n).run_name for n in (1, 2)] == ["loop-round-01", "loop-round-02"]
    mine = IterativeDPO(DPOConfig(**given, report_to=("wandb",), run_name="mine"), settings)
    assert mine.training(2).run_name == "mine-round-02"
    folders = IterativeDPO(DPOConfig(**given, report_to=("tensorboard",)), settings)
    assert folders.training(2).run_name is None


def test_a_loop_asks_for_what_is_missing_before_it_collects(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    (tmp_path / "rewards.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    settings = IterativeSettings(prompts="prompts.txt", reward=f"{tmp_path}/rewards.py:length")
    told = DPOConfig(model=config.model, output=str(tmp_path / "l"), report_to=("tensorboard",))
    with pytest.raises(ConfigError, match="tensorboardX"):
        IterativeDPO(told, settings)


def test_a_name_is_that_of_the_folder_as_it_is_called(config, monkeypatch, tmp_path):
    from mlx_dpo.runs.trackers import run_name

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_name(replace(config, output=".")) == "here"
    assert run_name(replace(config, report_to=("wandb",), run_name="mine")) == "mine"
