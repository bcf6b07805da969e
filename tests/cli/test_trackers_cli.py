"""What `train` prints about its trackers."""

import json

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.runs import trackers
from tests.checkpoints import make_checkpoint
from tests.cli.terminal import TerminalSession


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


def test_the_header_shows_where_the_run_is_logged():
    result = train("--max-steps", "3", "--report-to", "tensorboard")
    assert result.exit_code == 0, result.output
    assert "logging       tensorboard: tensorboard --logdir run/tensorboard\n" in result.stdout


def test_the_header_has_no_logging_line_without_trackers():
    result = train("--max-steps", "3")
    assert "logging" not in result.stdout


def test_what_a_library_prints_does_not_break_the_progress_bar(monkeypatch, tmp_path):
    """trackio prints when it starts and when it finishes."""
    flags = ("--max-steps", "3", "--report-to", "trackio", "--project", "a b")
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    session = TerminalSession(*WORDS, *flags, **env)
    session.until("adapters in run")
    assert session.exit_code() == 0
    session.close()
    assert "trackio: trackio show --project 'a b'" in session.output
    assert "* " not in session.output


class Failing:
    name, location = "failing", "nowhere"

    def log(self, row):
        if row["step"] == 2:
            raise OSError(28, "No space left on device")

    def close(self, *, completed):
        raise OSError(28, "No space left on device")

    @staticmethod
    def library_errors():
        return (OSError,)


def test_a_failing_tracker_is_one_warning_and_the_run_completes(monkeypatch):
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    monkeypatch.setattr(trackers, "open_tracker", lambda name, run_info, warned: Failing())
    result = train("--max-steps", "4", "--report-to", "wandb")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("failing") == 1
    assert (
        "Warning: failing: logging stopped at step 2 (No space left on device); the run continues, "
        "and metrics.jsonl has every row\n"
    ) in result.stderr


def test_a_failure_when_the_tracker_closes_is_a_warning(monkeypatch):
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    monkeypatch.setattr(trackers, "open_tracker", lambda name, run_info, warned: Failing())
    result = train("--max-steps", "1", "--warmup-ratio", "0", "--report-to", "wandb")
    assert result.exit_code == 0, result.output
    assert (
        "Warning: failing: the last rows may be missing (No space left on device); metrics.jsonl "
        "has every row\n"
    ) in result.stderr


def test_a_settings_file_may_list_trackers(tmp_path):
    (tmp_path / "run.yaml").write_text("report_to: [tensorboard]\nmax_steps: 3\n")
    result = train("--config", "run.yaml")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["report_to"] == [
        "tensorboard"
    ]
