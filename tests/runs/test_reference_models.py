"""What a run holds its policy against: another model, nothing, or a model that moves."""

import json
import math
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_dpo import DPOConfig, DPOTrainer, evaluate_run
from mlx_dpo.cli import cli
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.models.load import load_model
from mlx_dpo.runs import reference as references
from mlx_dpo.runs.distributed import shard_base
from mlx_dpo.scoring.score_pairs import score_pairs
from tests.checkpoints import make_checkpoint
from tests.runs.train_helper import train, weights


def same(a, b):
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


@pytest.fixture
def other(tmp_path):
    return make_checkpoint(tmp_path / "other", seed=9, hidden=32)


@pytest.fixture
def against_other(config, other):
    return replace(config, reference_model=str(other), lora_dropout=0.0)


def test_another_model_is_what_rewards_are_taken_against(against_other, other):
    with DPOTrainer(against_other) as trainer:
        trainer.prepare()
        pairs = trainer.inputs.train
        first = next(trainer.steps())
    model = mlx_lm.load(str(other))[0]
    known = score_pairs(model, pairs, limit=PassLimit(pairs=2))
    assert mx.allclose(trainer.reference["train"].chosen, known.chosen, atol=1e-4)
    assert mx.allclose(trainer.reference["train"].rejected, known.rejected, atol=1e-4)
    # The first update has rate 0, so the policy is the base: by hand from both models.
    base = score_pairs(mlx_lm.load(against_other.model)[0], pairs, limit=PassLimit(pairs=2))
    at = PairOrder(count=len(pairs), batch_size=4, seed=against_other.seed).step(0)
    rewards = 0.1 * (base.take(at).chosen - known.take(at).chosen)
    assert first["rewards/chosen"] == pytest.approx(rewards.mean().item(), abs=1e-4)


def test_the_reference_is_loaded_once_and_freed_before_the_policy_is_loaded(
    against_other, monkeypatch
):
    loaded_sources = []

    def watched(source, **how):
        loaded_sources.append(source)
        return load_model(source, **how)

    monkeypatch.setattr(shard_base, "load_model", watched)
    _, rows = train(against_other, stop_after=2)
    assert loaded_sources == [against_other.reference_model, against_other.model]
    _, more = train(against_other, resume=True)
    assert loaded_sources.count(against_other.reference_model) == 1  # the folder has the log-probs
    straight = replace(against_other, output=against_other.output + "-2")
    _, expected = train(straight)
    assert [r["loss"] for r in rows + more if "loss" in r] == [
        r["loss"] for r in expected if "loss" in r
    ]
    assert same(weights(against_other), weights(straight))


def test_a_reference_model_that_has_changed_stops_a_resumed_run(against_other, other):
    train(against_other, stop_after=2)
    make_checkpoint(other, seed=10, hidden=32)
    with pytest.raises(RunError, match="the reference model changed"):
        train(against_other, resume=True)


def test_other_tokens_are_refused_before_anything_is_written(against_other, other, tmp_path):
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["I"], words["t"] = words["t"], words["I"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="its tokenizer differs from the model's"):
        train(against_other)
    assert not (tmp_path / "run" / "run.json").exists()


def test_evaluating_again_asks_the_same_reference(against_other):
    trainer, _ = train(against_other)
    again = evaluate_run(against_other.output).metrics
    assert again.margins == pytest.approx(trainer.evaluation["eval_rewards/margins"], abs=1e-5)


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo", "sft"])
def test_losses_without_a_reference_never_compute_one(config, monkeypatch, tmp_path, loss):
    monkeypatch.setattr(references, "reference_cache", None)  # calling it would fail
    config = replace(config, loss_type=(loss,))
    trainer, _ = train(config)
    assert not (tmp_path / "run" / "reference").exists()
    assert trainer.reference["train"].chosen.tolist() == [0.0] * 9
    again = evaluate_run(config.output).metrics
    assert again.loss == pytest.approx(trainer.evaluation["eval_loss"], abs=1e-5)


def test_a_moving_reference_is_the_policy_of_then(config):
    """Steps 3 and 5 follow a hard update: rewards are those of no difference."""
    config = replace(
        config, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=2,
        lora_dropout=0.0, warmup_ratio=0.0, save_steps=1,
    )  # fmt: skip
    _, rows = train(config)
    steps = [row for row in rows if "loss" in row]
    assert [abs(row["rewards/margins"]) < 1e-5 for row in steps] == [True, False] * 3
    assert steps[2]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_run_with_a_moving_reference_resumes_bit_for_bit(config, tmp_path, stop_after):
    config = replace(config, sync_ref_model=True, ref_model_mixup_alpha=0.5, ref_model_sync_steps=2)
    straight = replace(config, output=str(tmp_path / "straight"))
    whole, _ = train(straight)
    train(config, stop_after=stop_after)
    trainer, _ = train(config, resume=True)
    assert same(weights(config), weights(straight))
    assert trainer.evaluation["eval_loss"] == whole.evaluation["eval_loss"]
    again = evaluate_run(config.output).metrics
    assert again.loss == pytest.approx(trainer.evaluation["eval_loss"], abs=1e-5)


@pytest.fixture
def judged(config, tmp_path):
    path = tmp_path / "judged.jsonl"
    rows = [
        {"prompt": f"What is {i}?", "completion": f"It is {i}, friend.", "label": bool(i % 3)}
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(config, pairs=str(path), loss_type=("kto",), lora_dropout=0.0)


def test_kto_begins_at_a_half_with_rewards_of_zero_for_every_micro_batch_size(judged, tmp_path):
    _, rows = train(judged)
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(rows[0].get("rewards/chosen", 0.0)) < 1e-5
    other = replace(judged, output=str(tmp_path / "other"), micro_batch_size=1)
    _, others = train(other)
    for a, b in zip(rows, others, strict=True):
        key = "eval_loss" if "eval_loss" in a else "loss"
        assert a[key] == pytest.approx(b[key], abs=1e-5)
    assert rows[-1]["eval_kl"] == pytest.approx(others[-1]["eval_kl"], abs=1e-4)


def test_kto_resumes_bit_for_bit_and_is_evaluated_again(judged, tmp_path):
    straight = replace(judged, output=str(tmp_path / "straight"))
    trainer, _ = train(straight)
    train(judged, stop_after=3)
    train(judged, resume=True)
    assert same(weights(judged), weights(straight))
    again = evaluate_run(judged.output).metrics
    assert again.loss == pytest.approx(trainer.evaluation["eval_loss"], abs=1e-5)
    assert again.accuracies == trainer.evaluation["eval_rewards/accuracies"]


def test_pairs_become_judged_answers_for_kto(config, tmp_path):
    config = replace(config, loss_type=("kto",))
    with DPOTrainer(config) as trainer:
        trainer.load()
    assert len(trainer.inputs.train) + len(trainer.inputs.valid) == 24
    for row in trainer.inputs.train:
        assert row.rejected and row.desirable is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_model_sync_steps": 2}, "without `sync_ref_model`"),
        ({"ref_model_mixup_alpha": 0.5}, "without `sync_ref_model`"),
        (
            {
                "sync_ref_model": True,
                "metric_for_best_model": "loss",
                "eval_steps": 1,
                "load_best_model_at_end": True,
            },
            "leave out one of them",
        ),
        ({"loss_type": ["aot"], "weight_column": "w"}, "`weight_column` is not defined"),
        ({"loss_type": ["simpo"], "f_divergence_type": "reverse_kl"}, "`f_divergence_type`"),
        ({"sync_ref_model": True, "reference_model": "m"}, "leave out one of them"),
        ({"loss_type": ["simpo"], "reference_model": "m"}, "reference-free"),
        ({"loss_type": ["orpo"], "sync_ref_model": True}, "reference-free"),
        ({"loss_type": ["kto"], "batch_size": 1}, "`batch_size` must be at least 2"),
        ({"loss_type": ["kto"], "margin_column": "m"}, "`margin_column` has no effect"),
        ({"loss_type": ["ipo"], "margin_column": "m"}, "`margin_column` has no effect"),
    ],
)
def test_settings_without_effect_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig.from_dict(changes)


def test_a_reference_that_never_moves_is_refused(config):
    config = replace(config, sync_ref_model=True, ref_model_sync_steps=6)
    with pytest.raises(ConfigError, match="`sync_ref_model` has no effect"):
        train(config)


def test_evaluating_again_believes_no_other_reference(against_other, other, config, tmp_path):
    train(against_other)
    make_checkpoint(other, seed=10, hidden=32)
    with pytest.raises(RunError, match="the reference model changed"):
        evaluate_run(against_other.output)
    moving = replace(
        config, output=str(tmp_path / "moving"), sync_ref_model=True, ref_model_sync_steps=2
    )
    train(moving)
    shutil.rmtree(tmp_path / "moving" / "checkpoints")
    with pytest.raises(RunError, match="its weights are missing"):
        evaluate_run(moving.output)


def test_a_relative_reference_model_is_resolved_from_another_folder(
    against_other, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    trainer, _ = train(replace(against_other, reference_model="other"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = evaluate_run(against_other.output).metrics
    assert again.loss == pytest.approx(trainer.evaluation["eval_loss"], abs=1e-5)


def test_a_synced_reference_of_a_bfloat16_model_is_scored_in_its_own_dtype(config, tmp_path):
    config = replace(
        config, dtype="bfloat16", fine_tune_type="full", lora_r=None, lora_dropout=None,
        sync_ref_model=True, ref_model_sync_steps=2, learning_rate=1e-3,
    )  # fmt: skip
    trainer, _ = train(config)
    again = evaluate_run(config.output).metrics
    assert again.loss == pytest.approx(trainer.evaluation["eval_loss"], abs=1e-6)
    assert again.chosen_logps == pytest.approx(trainer.evaluation["eval_logps/chosen"], abs=1e-5)


def test_dropout_over_a_start_adapter_is_seeded(config, tmp_path):
    train(config)
    go_on = replace(config, start_adapter=config.output, lora_r=None, lora_dropout=0.3)
    runs = [replace(go_on, output=str(tmp_path / name)) for name in ("one", "two")]
    for run in runs:
        train(run)
    assert same(*map(weights, runs))


@pytest.mark.parametrize("label", [True, False])
def test_steps_with_only_desirable_or_undesirable_completions_are_shown_without_missing_metrics(
    judged, tmp_path, label
):
    path = tmp_path / "judged.jsonl"
    rows = [json.loads(line) | {"label": label} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", str(path), "--model", judged.model, "--output", str(tmp_path / "one")]
    result = CliRunner().invoke(
        cli, [*command, "--loss-type", "kto", "--batch-size", "4", "--valid-fraction", "0.25"]
    )
    assert result.exit_code == 0, result.output
    assert "margin -" in result.output
