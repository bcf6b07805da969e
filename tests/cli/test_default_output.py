"""The run folder that `train` chooses, finds again with `--resume`, and replaces on request."""

import json
from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.cli.default_output import choose_run_folder, find_unfinished_run
from mlx_dpo.errors import ConfigError
from tests.checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))


def test_a_new_folder_is_named_after_model_and_day():
    today = date.today()
    assert choose_run_folder("org/Model-4bit") == f"runs/Model-4bit-{today}"
    assert choose_run_folder("some where/my model/") == f"runs/my-model-{today}"
    Path(f"runs/m-{today}").mkdir(parents=True)
    Path(f"runs/m-{today}-2").mkdir()
    assert choose_run_folder("m") == f"runs/m-{today}-3"


def train(*words):
    return CliRunner().invoke(cli, ["train", *words])


@pytest.fixture
def unfinished():
    """Write pairs and a run that was stopped by an error after its record was written."""
    make_checkpoint(Path("base"))
    rows = [{"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": "no"} for n in range(8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails = ("--learning-rate", "1e30", "--max-grad-norm", "0", "--epochs", "4", "--batch-size",
             "4", "--lr-scheduler-type", "constant", "--valid-fraction", "0")  # fmt: skip
    result = train("pairs.jsonl", "--model", "base", *fails)
    assert result.exit_code == 1, result.output
    return f"runs/base-{date.today()}"


def test_a_run_without_output_is_found_again(unfinished):
    """It says which folder it writes and which it resumes; several are a question."""
    assert find_unfinished_run() == unfinished
    result = train("--resume")
    assert f"Resuming {unfinished}\n" in result.stderr
    assert "resuming after step" in result.stdout
    again = train("pairs.jsonl", "--model", "base", "--learning-rate", "1e30", "--max-grad-norm",
                  "0", "--epochs", "4", "--batch-size", "4")  # fmt: skip
    assert f"Run folder: {unfinished}-2\n" in again.stderr
    with pytest.raises(ConfigError, match=f"2 unfinished runs .*{unfinished}, {unfinished}-2"):
        find_unfinished_run()


def test_only_a_run_is_overwritten(unfinished):
    Path("notes").mkdir()
    Path("notes/thesis.txt").write_text("x")
    words = ("pairs.jsonl", "--model", "base", "--overwrite", "--learning-rate", "1e-3")
    refused = train(*words, "--output", "notes")
    assert refused.exit_code == 1 and "not a run folder (found `thesis.txt`)" in refused.stderr
    assert Path("notes/thesis.txt").exists()
    replaced = train(*words, "--output", unfinished)
    assert replaced.exit_code == 0, replaced.output
    assert json.loads(Path(unfinished, "run.json").read_text())["state"] == "finished"


def test_overwrite_needs_an_output():
    refused = train("pairs.jsonl", "--model", "base", "--overwrite")
    assert refused.exit_code == 1
    assert "`--overwrite` has no effect without --output" in refused.stderr
    assert not Path("runs").exists()
