"""Whole runs of instruction tuning, and preference training from their adapters."""

import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo import DPOConfig, DPOTrainer, evaluate_run
from mlx_dpo.config.training import PassLimit
from mlx_dpo.hub.run_card import make_run_card
from mlx_dpo.io.checksums import read_checked_json
from mlx_dpo.losses.metrics import to_public_names
from mlx_dpo.runs.summary import summarize_training
from mlx_dpo.saved_runs.details import describe_run
from mlx_dpo.saved_runs.report import read_logged_run
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training.monitor.verdict import describe_result
from tests.runs.train_helper import train, weights

PREFERENCE_WORDS = ("margin", "prefer", "reward", "rejected", "chosen completion", "pairs")


def conversation(number):
    turns = []
    for i in range(1 + number % 3):
        turns.append({"role": "user", "content": f"What is {number + i}?"})
        turns.append({"role": "assistant", "content": f"It is {number + i}{'!' * i}"})
    return {"messages": turns}


@pytest.fixture
def sft(settings, tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(12)))
    return DPOConfig.from_dict(settings | {"pairs": str(path), "loss_type": "sft", "samples": 0})


def cross_entropy(model, pairs):
    """Mean over all scored tokens, one row after the other, in float64."""
    total = count = 0
    for pair in pairs:
        text = [*pair.prompt, *pair.chosen]
        logits = np.array(model(mx.array([text]))[0].astype(mx.float32), np.float64)
        for place in pair.scored:
            row = logits[len(pair.prompt) + place - 1]
            total += np.log(np.exp(row).sum()) - row[pair.chosen[place]]
            count += 1
    return total / count


def test_a_run_minimizes_the_cross_entropy_per_token_and_needs_no_reference(sft):
    with DPOTrainer(sft) as trainer:
        trainer.prepare()
        lines = dict(summarize_training(trainer))
        assert lines["reference"] == "none: the loss needs none" and lines["loss"] == "sft"
        trainer.policy.eval()
        before = cross_entropy(trainer.policy, trainer.inputs.valid)
        rows = list(trainer.steps())
    assert trainer.record["before"]["eval_loss"] == pytest.approx(before, abs=1e-5)
    after = cross_entropy(trainer.policy, trainer.inputs.valid)
    assert rows[-1]["eval_loss"] == pytest.approx(after, abs=1e-5)
    assert after < before
    tokens = [len(p.prompt) + len(p.chosen) for p in trainer.inputs.train]
    assert rows[-2]["num_tokens"] == 2 * sum(tokens)  # two epochs, and each row counts once


def test_metrics_are_those_of_trls_trainer_and_none_of_preferences(sft):
    _, rows = train(sft)
    names = {"loss", "mean_token_accuracy", "logps/chosen", "lengths/chosen"}
    others = {"step", "epoch", "grad_norm", "learning_rate", "num_tokens", "padding_share",
              "tokens_per_second", "peak_memory_gb"}  # fmt: skip
    assert rows[0].keys() == names | others
    assert rows[-1].keys() == {"step", *(f"eval_{name}" for name in names)}


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(sft, tmp_path):
    straight = replace(sft, output=str(tmp_path / "straight"))
    train(straight)
    train(sft, stop_after=3)
    train(sft, resume=True)
    for name, value in weights(straight).items():
        assert mx.array_equal(value, weights(sft)[name]), name


def test_a_run_can_stop_at_its_best_token_accuracy(sft):
    best = "mean_token_accuracy"
    trainer, rows = train(
        replace(sft, metric_for_best_model=best, load_best_model_at_end=True, eval_steps=1)
    )
    values = [row[f"eval_{best}"] for row in rows if f"eval_{best}" in row]
    assert trainer.record["best_checkpoint"][f"eval_{best}"] == max(values)


def test_the_chosen_answers_of_pairs_are_trained_on_without_the_rejected_ones(settings, tmp_path):
    config = DPOConfig.from_dict(settings | {"loss_type": "sft", "samples": 0, "epochs": 1})
    other = tmp_path / "other.jsonl"
    rows = [json.loads(line) for line in Path(settings["pairs"]).read_text().splitlines()]
    other.write_text("".join(json.dumps(row | {"rejected": "?"}) + "\n" for row in rows))
    _, first = train(config)
    changed = replace(config, pairs=(str(other),), output=config.output + "-2")
    train(changed)
    assert first[0]["loss"] > 0
    for name, value in weights(config).items():
        assert mx.array_equal(value, weights(changed)[name]), name


def test_preference_training_takes_the_tuned_model_as_its_reference(sft, settings):
    tuned, _ = train(sft)
    settings |= {"lora_dropout": 0.0, "samples": 0, "epochs": 1}
    config = DPOConfig.from_dict(
        settings | {"output": sft.output + "-dpo", "start_adapter": sft.output, "lora_r": None}
    )
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        pairs = trainer.inputs.train
        rows = list(trainer.steps())
        reference = trainer.reference["train"]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    tuned.policy.eval()
    expected = score_pairs(tuned.policy, pairs, limit=PassLimit(pairs=3))
    for ours, theirs in zip(reference, expected, strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-4)
    other = DPOConfig.from_dict(settings | {"output": sft.output + "-base"})
    with DPOTrainer(other) as trainer:
        trainer.prepare()
        base = trainer.reference["train"]
    assert np.abs(np.array(base.chosen) - np.array(expected.chosen)).min() > 0.01


def test_eval_report_and_card_have_no_words_of_preferences(sft, monkeypatch, tmp_path):
    trainer, rows = train(sft)
    evaluation = evaluate_run(sft.output)
    row = to_public_names(evaluation.metrics, prefix="eval_")
    assert row["eval_loss"] == pytest.approx(rows[-1]["eval_loss"], abs=1e-6)
    assert evaluation.verdict is None and evaluation.description == "3 held-out rows"
    result = describe_result(None, row, "3 held-out rows", trainer.record["before"])
    before = trainer.record["before"]["eval_loss"]
    assert f"{row['eval_loss']:.4f} ({before:.4f} before training), and the policy ranks" in result
    details = describe_run(read_logged_run(sft.output), "run", {})
    card, _ = make_run_card(sft.output, "org/adapter", base="org/base")
    parts = (details.summary, details.result, details.figures, details.facts, details.metrics)
    for text in map(str, (result, *parts, details.evaluations, card)):
        assert not [word for word in PREFERENCE_WORDS if word in text.lower()], text
    assert details.result.level == "good"
    assert card.data.to_dict()["tags"] == ["mlx-dpo", "mlx", "lora", "instruction-tuning", "sft"]


def test_the_learning_rate_is_that_of_instruction_tuning(sft):
    with DPOTrainer(replace(sft, learning_rate=None)) as trainer:
        trainer.prepare()
    record, _ = read_checked_json(trainer.paths.record)
    assert "instruction tuning" in record["chosen_settings"]["learning_rate"]
