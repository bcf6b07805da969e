"""What `train` says of the programs that it tells."""

import json

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.reporting import trackers as programs
from tests.checkpoints import make_checkpoint
from tests.cli.terminal import Session


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    make_checkpoint(tmp_path / "base")
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, friend.", "rejected": f"{i * 7} no"}
        for i in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


WORDS = ("train", "pairs.jsonl", "--model", "base", "--output", "run", "--batch-size", "4")


def train(*words):
    return CliRunner().invoke(cli, [*WORDS, *words])


def test_where_to_see_it_is_said_in_the_header():
    result = train("--max-steps", "3", "--report-to", "tensorboard")
    assert result.exit_code == 0, result.output
    assert "told       tensorboard: tensorboard --logdir run/tensorboard\n" in result.stdout


def test_nobody_told_is_not_said():
    result = train("--max-steps", "3")
    assert "told" not in result.stdout


def test_on_a_terminal_a_library_that_talks_leaves_the_bar_alone(monkeypatch, tmp_path):
    """trackio prints when it begins and when it ends."""
    pytest.importorskip("trackio")
    session = Session(*WORDS, "--max-steps", "3", "--report-to", "trackio", "--project", "a b",
                      TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")  # fmt: skip
    session.until("Adapters in run")
    assert session.exit_code() == 0
    session.close()
    assert "trackio: trackio show --project 'a b'" in session.seen
    assert "* " not in session.seen


class Failing:
    name, where = "failing", "nowhere"

    def write(self, row):
        if row["step"] == 2:
            raise OSError(28, "No space left on device")

    def close(self, *, whole):
        raise OSError(28, "No space left on device")

    @staticmethod
    def failures():
        return (OSError,)


def test_a_program_that_fails_is_said_once_and_the_run_ends_well(monkeypatch):
    monkeypatch.setattr(programs, "check", lambda name: None)
    monkeypatch.setattr(programs, "begin", lambda name, announced, heard: Failing())
    result = train("--max-steps", "4", "--report-to", "wandb")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("failing") == 1
    assert (
        "Warning: failing is told nothing from step 2 on (No space left on device); the run goes "
        "on, and all is in metrics.jsonl\n"
    ) in result.stderr


def test_an_end_that_a_program_does_not_get_is_said(monkeypatch):
    monkeypatch.setattr(programs, "check", lambda name: None)
    monkeypatch.setattr(programs, "begin", lambda name, announced, heard: Failing())
    result = train("--max-steps", "1", "--warmup-ratio", "0", "--report-to", "wandb")
    assert result.exit_code == 0, result.output
    assert (
        "Warning: failing may lack the end of the run (No space left on device); all is in "
        "metrics.jsonl\n"
    ) in result.stderr


def test_flags_and_files_name_several(tmp_path):
    (tmp_path / "run.yaml").write_text("report_to: [tensorboard]\nmax_steps: 3\n")
    result = train("--config", "run.yaml")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["report_to"] == [
        "tensorboard"
    ]
