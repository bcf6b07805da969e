"""Early stopping and the best evaluation's adapters, through whole runs and crashes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dpo import DPOTrainer, evaluate_run
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.reporting.metrics_log import read_metrics
from tests.damaged_files import damage

EVERY = 2


@pytest.fixture
def config(config):
    """Nine pairs, learned by heart at a rate that spoils the three that are held out."""
    return replace(
        config, learning_rate=0.03, epochs=8, save_steps=3, eval_steps=EVERY, seed=0,
        metric_for_best_model="loss", load_best_model_at_end=True, early_stopping_patience=4,
    )  # fmt: skip


def train(config, *, resume=False, drop_after=None):
    """Rows of a run; it is killed after so many of them."""
    rows = []
    with DPOTrainer(config, resume=resume) as trainer:
        trainer.prepare()
        for row in trainer.steps():
            rows.append(row)
            if len(rows) == drop_after:
                break
    return trainer, rows


def adapters(folder):
    return mx.load(str(Path(folder) / "adapters.safetensors"))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert mx.array_equal(value, second[name]), name


def record(config):
    return json.loads((Path(config.output) / "run.json").read_text())


def losses(config):
    rows = read_metrics(Path(config.output) / "metrics.jsonl")
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def test_the_run_stops_when_patience_ends_and_keeps_the_best(config):
    trainer, rows = train(config)
    eval_losses = losses(config)
    best = min(eval_losses, key=eval_losses.get)
    assert 1 < len(eval_losses) < trainer.total_steps // EVERY  # else there was nothing to see
    assert trainer.stopped_early_at == max(eval_losses) == best + 4 * EVERY
    assert rows[-1]["step"] == trainer.stopped_early_at
    assert len([row for row in rows if "eval_loss" in row]) == len(eval_losses)  # each yielded once
    saved_record = record(config)
    assert saved_record["best_checkpoint"] == {"step": best, "eval_loss": eval_losses[best]}
    assert saved_record["stopped_early_at"] == trainer.stopped_early_at
    assert saved_record["state"] == "finished"
    assert saved_record["evaluation"] == trainer.evaluation
    assert trainer.evaluation["eval_loss"] == eval_losses[best]
    assert evaluate_run(config.output).metrics.loss == pytest.approx(eval_losses[best], abs=1e-6)
    assert not trainer.paths.best_adapters.exists()


def test_the_best_adapters_equal_those_of_a_run_that_ends_at_the_best_step(config, tmp_path):
    """The rate is constant, so that a shorter run takes the same steps."""
    config = replace(config, lr_scheduler_type="constant", learning_rate=0.01)
    train(config)
    step = record(config)["best_checkpoint"]["step"]
    plain = {"metric_for_best_model": None, "load_best_model_at_end": False,
             "early_stopping_patience": None}  # fmt: skip
    short = replace(
        config, output=str(tmp_path / "short"), epochs=None, max_steps=step, eval_steps=None,
        **plain,
    )  # fmt: skip
    train(short)
    assert_same(adapters(short.output), adapters(config.output))


def test_without_load_best_model_the_last_adapters_are_saved(config, tmp_path):
    trainer, _ = train(replace(config, load_best_model_at_end=False))
    assert trainer.stopped_early_at is not None
    assert record(config)["best_checkpoint"] is None
    assert trainer.evaluation["step"] == trainer.stopped_early_at
    last = trainer.paths.checkpoints / f"step-{trainer.stopped_early_at:06d}"
    assert_same(adapters(last), adapters(config.output))


def test_the_best_may_be_the_last(config):
    config = replace(config, learning_rate=1e-4, early_stopping_patience=None)
    trainer, _ = train(config)
    assert trainer.stopped_early_at is None
    assert record(config)["best_checkpoint"]["step"] == trainer.total_steps


def test_a_run_killed_after_any_row_ends_at_the_same_adapters(config, tmp_path):
    config = replace(
        config, learning_rate=0.05, eval_steps=1, save_steps=2, early_stopping_patience=2
    )
    straight = replace(config, output=str(tmp_path / "straight"))
    cuts = []
    with DPOTrainer(straight) as trainer:
        trainer.prepare()
        for _ in trainer.steps():
            cuts.append(replace(config, output=str(tmp_path / f"cut-{len(cuts)}")))
            shutil.copytree(straight.output, cuts[-1].output)  # what a kill would leave
    expected = record(straight)
    assert trainer.stopped_early_at > expected["best_checkpoint"]["step"] > config.save_steps
    for cut in cuts:
        again, _ = train(cut, resume=True)
        assert_same(adapters(straight.output), adapters(cut.output))
        for name in ("best_checkpoint", "stopped_early_at", "warnings"):
            assert record(cut)[name] == expected[name]
        assert losses(cut) == losses(straight)
        assert not again.paths.best_adapters.exists()
        shutil.rmtree(cut.output)


def test_a_run_killed_after_it_stopped_early_does_not_go_on(config, monkeypatch):
    """At the moment between its last checkpoint and the end."""
    straight = replace(config, output=f"{config.output}-straight")
    train(straight)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlx_dpo.runs.early_stopping.BestCheckpoint.load_into", fail)
        with pytest.raises(OSError, match="space"):
            train(config)
    assert record(config)["state"] == "unfinished"
    trainer, rows = train(config, resume=True)
    assert [row["step"] for row in rows] == [trainer.stopped_early_at]  # the evaluation, told again
    assert_same(adapters(straight.output), adapters(config.output))


def test_an_older_checkpoint_still_finds_the_best_of_its_time(config):
    """The newest one may be removed because it is damaged."""
    straight = replace(config, output=f"{config.output}-straight")
    train(straight)
    trainer, _ = train(config, drop_after=11)
    checkpoints = sorted(trainer.paths.checkpoints.iterdir())
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    train(config, resume=True)
    assert_same(adapters(straight.output), adapters(config.output))


def test_only_the_best_adapters_that_a_checkpoint_can_need_stay_on_disk(config):
    config = replace(config, learning_rate=1e-3, early_stopping_patience=None)
    most = 0
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        for row in trainer.steps():
            if row["step"] % config.save_steps == 1:
                most = max(most, len(list(trainer.paths.best_adapters.glob("*"))))
    assert 0 < most <= 1 + config.save_total_limit


@pytest.mark.parametrize("change", ["removed", "flipped"])
def test_a_run_without_its_best_adapters_resumes_from_before_them(config, caplog, change):
    straight = replace(config, output=f"{config.output}-straight")
    train(straight)
    trainer, _ = train(config, drop_after=11)
    for folder in trainer.paths.best_adapters.iterdir():
        damage(folder / "adapters.safetensors", change)
    train(config, resume=True)
    assert "/adapters.safetensors: damaged (" in caplog.text
    assert "resuming from the beginning" in caplog.text
    assert_same(adapters(straight.output), adapters(config.output))
    assert record(config)["best_checkpoint"] == record(straight)["best_checkpoint"]


def test_the_error_of_a_finished_run_names_its_number_of_steps(config):
    trainer, _ = train(config)
    with pytest.raises(RunError, match=f"finished after {trainer.stopped_early_at} steps"):
        DPOTrainer(config).__enter__()


def test_resuming_with_other_evaluations_is_refused_where_they_decide(config):
    train(config, drop_after=5)
    with pytest.raises(RunError, match="began with eval_steps = 2, not 3"):
        DPOTrainer(replace(config, eval_steps=3), resume=True).__enter__()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_for_best_model": "accuracy"}, "`metric_for_best_model` must be one of logps/"),
        ({"eval_steps": 24, "early_stopping_patience": None},
         "several evaluations to choose from: an evaluation every 24 of 24 steps"),
        ({"early_stopping_patience": 11}, "`early_stopping_patience` 11 has no effect .* than 11"),
    ],
)  # fmt: skip
def test_what_can_decide_nothing_is_refused_before_anything_is_written(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(replace(config, **changes))
    assert not Path(config.output).exists()


def test_the_most_patience_that_can_end_is_taken(config):
    with DPOTrainer(replace(config, early_stopping_patience=10)) as trainer:
        trainer.load()
