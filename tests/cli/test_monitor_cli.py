"""What `train` says of a run that is watched: the best evaluation, and what goes wrong."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dpo import DPOTrainer
from mlx_dpo.cli import cli
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.paths import tiny_chat
from tests.checkpoints import make_checkpoint

OVERSHOOTS = ("--learning-rate", "0.1", "--eval-steps", "1", "--valid-fraction", "0.25",
              "--max-steps", "12", "--batch-size", "4")  # fmt: skip


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


def train(*words):
    return CliRunner().invoke(
        cli, ["train", "pairs.jsonl", "--model", "base", "--output", "run", *words]
    )


def record():
    return json.loads(Path("run/run.json").read_text())


def test_a_run_that_stops_early_says_what_it_watches_and_how_it_ended():
    result = train(*OVERSHOOTS, "--metric-for-best-model", "loss", "--load-best-model-at-end",
                   "--early-stopping-patience", "3", "-v")  # fmt: skip
    assert result.exit_code == 0, result.output
    record_data = record()
    step, best = record_data["stopped_early_at"], record_data["best_checkpoint"]
    assert step == best["step"] + 3 < 12
    assert (
        "best checkpoint the run ends with the adapters of the lowest eval_loss; stops after 3 "
        "evaluations without an improvement\n"
    ) in result.stdout
    assert (
        f"early stop      after step {step} of 12: 3 evaluations in a row without an "
        f"improvement\nbest checkpoint step {best['step']}, eval_loss {best['eval_loss']:.4f}\n"
    ) in result.stdout
    table = " ".join(result.stdout.split())
    assert f" {best['eval_loss']:.4f} accuracy" in table  # of the adapters that are kept


def test_a_run_that_watches_nothing_says_nothing_of_it():
    shown = train("--batch-size", "4").stdout
    assert "\nbest checkpoint " not in shown
    assert "\nearly stop " not in shown


def test_an_unknown_metric_gives_a_one_line_error():
    result = train(*OVERSHOOTS, "--metric-for-best-model", "acc", "--load-best-model-at-end")
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: `metric_for_best_model` must be one of logps/chosen, ")
    assert not Path("run").exists()


IDLE = ("--learning-rate", "1e-9", "--max-steps", "24", "--batch-size", "4",
        "--max-grad-norm", "0")  # fmt: skip
SENTENCE = "the policy has hardly moved; use a larger learning_rate than 1e-09"


def test_warnings_are_printed_once_on_standard_error_and_recorded():
    result = train(*IDLE)
    assert result.exit_code == 0, result.output
    [warning] = result.stderr.splitlines()
    assert warning.startswith("Warning: steps 14 to 23: the loss stays at 0.6931")
    assert warning.endswith(SENTENCE)
    assert result.stdout.count(SENTENCE) == 1  # again at the end
    assert [f"Warning: {sentence}" for sentence in record()["warnings"]] == [warning]


def test_accuracy_is_no_result_while_the_margin_is_noise():
    """Said at the end of the run, by `eval`, in the record and on the report page."""
    idle = train(*IDLE).stdout
    evaluated = CliRunner().invoke(cli, ["eval", "run"]).stdout
    text = "the policy has hardly changed: the log-ratio margin is "
    for shown in (idle, evaluated):
        assert re.search("accuracy (- )?not meaningful", " ".join(shown.split()))
        assert f"\nresult        {text}" in shown
        assert "a larger learning_rate than 1e-09, such as 1e-08" in shown
    assert (
        "\noutput        adapters in run: nothing shows that they are better than the base" in idle
    )
    assert "accuracy -  repetition " in idle  # in the line of the evaluation
    assert record()["verdict"]["kind"] == "unchanged"
    as_json = json.loads(CliRunner().invoke(cli, ["eval", "run", "--json"]).stdout)
    assert as_json["verdict"]["text"].startswith(text)
    CliRunner().invoke(cli, ["report", "run"])
    page = Path("run/report.html").read_text()
    assert text in page
    assert "not meaningful" in page


BROKEN = ("--learning-rate", "1", "--lr-scheduler-type", "constant", "--max-steps", "5",
          "--batch-size", "8")  # fmt: skip


def test_a_run_that_falls_apart_does_not_end_as_a_success():
    """The shipped model: random weights have nothing to lose."""
    rows = (tiny_chat() / "preferences" / "train.jsonl").read_text().splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join(rows[:24]))
    result = train("--model", str(tiny_chat()), *BROKEN)
    assert result.exit_code == 0, result.output
    [warning] = result.stderr.splitlines()
    assert "the run has diverged (loss " in warning
    assert int(warning.split(" to ")[1].split(":")[0]) <= 5
    lines = result.stdout.splitlines()
    assert any(line.startswith("result        the policy is worse than the base") for line in lines)
    assert "output        adapters in run: they are worse than the base model" in lines
    assert "1 warning     " + warning.removeprefix("Warning: ") in lines
    assert "the policy is worse" in CliRunner().invoke(cli, ["eval", "run"]).stdout


def test_a_sound_run_has_no_verdict():
    result = train("--learning-rate", "1e-3", "--batch-size", "4", "--epochs", "8",
                   "--valid-fraction", "0.25")  # fmt: skip
    assert record()["verdict"] is None
    assert "\noutput        adapters in run\n" in result.stdout
    assert "\nresult        the policy prefers the chosen completions: " in result.stdout


def test_a_run_that_goes_on_does_not_say_it_again():
    settings = {"model": "base", "pairs": "pairs.jsonl", "output": "run", "max_steps": 24,
                "learning_rate": 1e-9, "batch_size": 4, "save_steps": 1,
                "max_grad_norm": 0.0}  # fmt: skip
    with DPOTrainer(DPOConfig.from_dict(settings)) as trainer:
        trainer.prepare()
        for row in trainer.steps():
            if row["step"] == 24:
                break  # killed, with the last checkpoint at 23
    assert len(trainer.warnings) == 1
    assert record()["warnings"] == trainer.warnings
    with DPOTrainer(DPOConfig.from_dict(settings), resume=True) as again:
        again.prepare()  # killed here
    assert record()["warnings"] == again.warnings == trainer.warnings
    result = train(*IDLE, "--resume", "--save-steps", "1")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert record()["warnings"] == trainer.warnings


def test_a_run_that_is_watched_can_be_planned():
    words = ["plan", "pairs.jsonl", "--model", "base", "--eval-steps", "2", "--json"]
    words += ["--metric-for-best-model", "loss", "--load-best-model-at-end"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
