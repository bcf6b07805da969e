"""Runs on more pairs than anybody wants to hold in memory: made only when they are asked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.data import dataset as store
from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.data.tokenization import cache as token_cache
from mlx_dpo.plan.run_estimate import estimate_run
from mlx_dpo.runs import auto_batch_size
from mlx_dpo.runs import inputs as inputs_of_runs
from mlx_dpo.runs.inputs import load_inputs
from mlx_dpo.runs.summary import summarize_inputs, summarize_training
from mlx_dpo.training.logps_cache import list_entries
from mlx_dpo.training.reference_logps import BLOCK_SIZE
from mlx_dpo.types import PairLogps
from tests.checkpoints import make_checkpoint

COUNT = 2000
COUNTED = 64  # pairs that the header and the plan count the distinct tokens of
SIZED = auto_batch_size.SIZED_PAIRS  # pairs by which the size of a pass is chosen


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Settings of a run on many pairs, whose tokens are kept."""
    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 0)
    monkeypatch.setattr("mlx_dpo.data.batches.micro_batches.COUNTED_PAIRS", COUNTED)
    monkeypatch.setattr("mlx_dpo.plan.epoch.COUNTED_PAIRS", COUNTED)
    rows = [
        {"prompt": f"Q{i}", "chosen": "y" * (i % 17 + 1), "rejected": "n" * (i % 5 + 1)}
        for i in range(COUNT)
    ]
    rows[5] |= {"prompt": "long " * 20}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DPOConfig(
        model=str(make_checkpoint(tmp_path / "base")), pairs=(str(path),), max_steps=2,
        output=str(tmp_path / "run"), batch_size=4, valid_fraction=0.2, loss_type=("simpo",),
    )  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """The places of all pairs that are made of tokens on the disk."""
    places = []
    pair = store.MappedPairs.pair

    def noted(self, at):
        places.append(at)
        return pair(self, at)

    monkeypatch.setattr(store.MappedPairs, "pair", noted)
    return places


def start(config):
    """A run up to its first step; what is said before it."""
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        header = summarize_inputs(trainer) + summarize_training(trainer)
        row = next(trainer.steps())
    return trainer, header, row


def test_a_start_makes_few_of_the_pairs(many, made):
    trainer, header, _ = start(many)
    assert len(trainer.inputs.train) + len(trainer.inputs.valid) == COUNT
    held_out = len(trainer.inputs.valid)  # scored before the first step: the loss has no reference
    assert len(made) <= 2 * (held_out + COUNTED) + SIZED + 60, "something makes every pair"
    assert "tokens read from the cache" not in [line for _, line in header]


def test_the_second_start_says_and_does_the_same_and_that_it_read_the_tokens(many, made):
    first, header, row = start(many)
    second, again, other = start(replace(many, output=many.output + "2"))
    assert len(made) <= 2 * (2 * (len(first.inputs.valid) + COUNTED) + SIZED + 60)
    assert [line for _, line in again if line not in [line for _, line in header]] == [
        "tokens read from the cache", many.output + "2",
    ]  # fmt: skip
    assert (other["loss"], other["grad_norm"]) == (row["loss"], row["grad_norm"])
    ours, theirs = (
        json.loads((run.paths.folder / "run.json").read_text()) for run in (first, second)
    )
    for name in ("pairs", "counts", "provenance"):
        assert ours[name] == theirs[name]


def test_a_plan_makes_few_of_the_pairs(many, made):
    found = estimate_run(replace(many, loss_type=("sigmoid",)))
    assert found.lengths.longest > 100
    # The thousand longest, which a pass is chosen of, and a block of the reference, read twice.
    assert len(made) <= 1100 + 2 * (BLOCK_SIZE - COUNTED) + SIZED


def test_mixed_sources_and_judged_answers_are_views_too(many, made, tmp_path):
    mixed = replace(many, pairs=many.pairs * 2, mix=(2.0, 0.5))
    found = load_inputs(mixed)
    assert (len(found.train), [report.per_epoch for report in found.reports]) == (
        2 * 1600 + 800, [3200, 800],
    )  # fmt: skip
    judged = replace(many, loss_type=("kto",), valid_fraction=0.1)
    answers = load_inputs(judged)
    whole = answers.provenance(judged)
    assert len(made) == 0
    assert whole["train"] == pairs_digest(list(answers.train))
    assert all(pair.rejected for pair in answers.train[:50])


def test_reference_logps_are_computed_block_by_block(many, made, tmp_path):
    """The log-probabilities are found again under the digests alone."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(many.pairs[0]).read_text().splitlines(keepends=True)[:300]))
    config = replace(
        many, pairs=(str(few),), loss_type=("sigmoid",), valid_fraction=0.1, max_steps=None
    )
    with DPOTrainer(config) as trainer:
        trainer.prepare()
    assert len(list_entries(tmp_path / "cache" / "reference")) == 3
    made.clear()
    with DPOTrainer(replace(config, output=config.output + "2")) as again:
        again.prepare()
    assert len(made) <= 40 + SIZED
    for split in ("train", "valid"):
        ours, theirs = trainer.reference[split], again.reference[split]
        assert isinstance(ours, PairLogps)
        assert ours.chosen.tolist() == theirs.chosen.tolist()


def test_other_processes_load_the_tokenizer_themselves(many, monkeypatch):
    """The tokens are the same, from the checkpoint's own files."""
    from mlx_dpo.data.tokenization import parallel as tokenizing

    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 1 << 30)
    monkeypatch.setattr(inputs_of_runs, "count_processes", lambda: 2)
    alone = load_inputs(many)
    monkeypatch.setattr(tokenizing, "MIN_PARALLEL_ROWS", 100)
    together = load_inputs(many)
    assert alone.provenance(many) == together.provenance(many)
    assert alone.reports == together.reports
