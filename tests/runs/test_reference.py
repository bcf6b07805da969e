"""Which pairs a run scores under its reference: those that its steps and evaluations see."""

import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dpo import DPOTrainer
from mlx_dpo.plan import estimate_run
from mlx_dpo.runs import reference
from mlx_dpo.runs import trainer as training
from mlx_dpo.runs.summary import summarize_training
from tests.checkpoints import make_checkpoint
from tests.runs.train_helper import train, weights


@pytest.fixture
def short(config):
    """One step of 4 of the 9 training pairs, with one pair per pass."""
    return replace(config, epochs=None, max_steps=1, warmup_ratio=0.0, micro_batch_size=1)


def prepared(config, **how):
    scored = []
    with DPOTrainer(config, **how) as trainer:
        trainer.load()
        trainer.attach()
        trainer.compute_reference_logps(scored.append)
        trainer.restore()
    return trainer, sum(scored)


def all_pairs(config, splits):
    return {split: range(len(pairs)) for split, pairs in splits.items()}


def test_a_short_run_scores_the_pairs_that_it_sees(short):
    trainer, scored = prepared(short)
    assert scored == 4 + 3
    is_scored = ~mx.isnan(trainer.reference["train"].chosen)
    assert is_scored.sum().item() == 4
    assert not mx.isnan(trainer.reference["valid"].rejected).any()
    lines = [text for _, text in summarize_training(trainer)]
    assert "on the 4 of 9 training pairs that the steps need" in lines
    estimate = estimate_run(short)
    assert estimate.epoch.reference_pairs == 7
    assert (
        estimate.epoch.reference_operations
        < estimate_run(replace(short, max_steps=3)).epoch.reference_operations
    )


def test_a_short_run_is_the_run_that_scores_all_pairs(short, tmp_path, monkeypatch):
    trainer, _ = train(short)
    monkeypatch.setattr(training, "needed_pairs", all_pairs)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "other-cache"))
    other = replace(short, output=str(tmp_path / "other"))
    whole, _ = train(other)
    assert not mx.isnan(whole.reference["train"].chosen).any()
    assert trainer.evaluation["eval_loss"] == whole.evaluation["eval_loss"]
    expected = weights(other)
    assert all(mx.array_equal(value, expected[name]) for name, value in weights(short).items())


def test_a_run_of_an_epoch_scores_all_pairs(config):
    trainer, scored = prepared(config)
    assert scored == 12
    assert not any("that the steps need" in text for _, text in summarize_training(trainer))


def test_a_stored_file_that_lacks_pairs_is_not_believed(short, tmp_path):
    """Whatever put it there: the pairs that the longer run needs are scored."""
    train(short)
    longer = replace(short, max_steps=2, output=str(tmp_path / "longer"), save_steps=1)
    expected, _ = train(replace(longer, output=str(tmp_path / "expected")))
    train(longer, stop_after=1)
    shutil.copy(tmp_path / "run/reference/train.safetensors", tmp_path / "longer/reference")
    trainer, _ = train(longer, resume=True)
    assert trainer.evaluation["eval_loss"] == expected.evaluation["eval_loss"]
    assert (~mx.isnan(trainer.reference["train"].chosen)).sum().item() == 8


def test_another_reference_model_scores_no_more(short, tmp_path):
    other = make_checkpoint(tmp_path / "other", seed=9, hidden=32)
    trainer, _ = train(replace(short, reference_model=str(other), lora_dropout=0.0))
    assert (~mx.isnan(trainer.reference["train"].chosen)).sum().item() == 4


def test_a_synced_reference_is_scored_ahead_until_its_first_update(config):
    config = replace(config, sync_ref_model=True, ref_model_sync_steps=2, lora_dropout=0.0)
    trainer, _ = train(config)
    assert (~mx.isnan(trainer.reference["train"].chosen)).sum().item() == 8
    moved = replace(config, ref_model_sync_steps=3)
    assert reference.needed_pairs(moved, trainer.inputs.splits) == all_pairs(
        moved, trainer.inputs.splits
    ) | {"train": list(range(9))}
