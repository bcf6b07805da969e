"""Micro-batches of a run: their limits, the line in the header, and passes without gradients."""

import re
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dpo import DPOConfig, DPOTrainer, evaluate_run
from mlx_dpo.paths import reference_cache_folder
from mlx_dpo.runs.build import INFERENCE_FACTOR, make_dataset_scorer
from mlx_dpo.runs.summary import summarize_training
from mlx_dpo.scoring.select_scorer import ScorerChoice
from mlx_dpo.training.logps_cache import list_entries
from mlx_dpo.types import PairLogps, TokenizedPair


def prepared(config):
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        return trainer, [text for name, text in micro_batch_lines(summarize_training(trainer))]


def micro_batch_lines(facts):
    """The line `micro-batches` and the lines without a name that follow it."""
    start = [name for name, _ in facts].index("micro-batches")
    rest = facts[start + 1 :]
    return [facts[start], *rest[: [bool(name) for name, _ in rest].index(True)]]


def tokens(pair):
    """What the shared scorer takes for a pair whose completions have several tokens."""
    return len(pair.prompt) + len(pair.chosen) - 1 + len(pair.rejected) - 1


def test_the_header_describes_a_micro_batch(config):
    """9 pairs in steps of 4, 4 and 1: 2 + 2 + 1 micro-batches."""
    trainer, [line] = prepared(config)
    header_line = re.fullmatch(
        r"up to 2 pairs, about 1.7 per step; (\d+) tokens on average, (.*)% padding",
        line,
    )
    real = sum(map(tokens, trainer.inputs.train))
    total = real / (1 - float(header_line[2]) / 100)
    assert int(header_line[1]) == pytest.approx(total / 5, rel=0.02)


def test_the_header_counts_pairs_longer_than_micro_batch_tokens(config):
    trainer, [first, second] = prepared(replace(config, micro_batch_tokens=1))
    longest = max(map(tokens, trainer.inputs.train))
    assert first.startswith("up to 1 tokens, about 3 per step; ")
    assert second == (
        "9 pairs exceed the limit of 1 tokens and are processed alone; "
        f"the longest has {longest} tokens"
    )
    assert ("micro-batches", second) in summarize_training(trainer, verbose=False)


def test_the_short_header_names_memory_if_something_was_changed_to_fit_into_it(config):
    trainer, _ = prepared(config)
    assert "memory" not in dict(summarize_training(trainer, verbose=False))
    trainer.fitted = replace(trainer.fitted, instead_of=trainer.fitted)
    assert "because" in dict(summarize_training(trainer, verbose=False))["memory"]


def test_the_header_has_both_limits(config):
    _, [line, *_] = prepared(replace(config, micro_batch_tokens=60, micro_batch_size=3))
    assert line.startswith("up to 3 pairs and 60 tokens, about ")


def test_micro_batch_tokens_limits_micro_batches_and_changes_no_result(config, tmp_path):
    rows = []
    for name, changes in (
        ("all", {"micro_batch_tokens": 10**6}),
        ("one", {"micro_batch_tokens": 1}),
    ):
        changed = replace(config, output=str(tmp_path / name), lora_dropout=0.0, **changes)
        with DPOTrainer(changed) as trainer:
            trainer.prepare()
            rows.append(list(trainer.steps()))
    for together, alone in zip(*rows, strict=True):
        for name in alone.keys() & {"loss", "logps/chosen", "grad_norm", "eval_loss"}:
            assert together[name] == pytest.approx(alone[name], rel=1e-4), name
    shares = [[row["padding_share"] for row in of if "loss" in row] for of in rows]
    assert max(shares[0]) == max(shares[1]) == 0.0  # one row holds no padding


@pytest.mark.parametrize(
    ("name", "recompute", "device", "largest"),
    [
        ("shared", False, "metal", 3 * INFERENCE_FACTOR),
        ("shared", True, "metal", 3),
        ("plain", False, "metal", 3),
        ("shared", False, "cpu", 3),
    ],
)
def test_forward_micro_batches_are_larger_than_those_of_training(
    name, recompute, device, largest, monkeypatch
):
    monkeypatch.setattr("mlx_dpo.runs.build.is_cpu", lambda: device == "cpu")
    held = []

    def scorer(model, pairs):
        held.append(len(pairs))
        return PairLogps(mx.zeros((len(pairs),)), mx.zeros((len(pairs),)))

    class Model:
        def eval(self):
            pass

    config = DPOConfig(micro_batch_size=3, recompute=recompute)
    score = make_dataset_scorer(
        config, ScorerChoice(scorer, scorer, name, "", None if name == "plain" else "row")
    )
    score(Model(), [TokenizedPair((1,), (2, 3), (4, 5))] * 30)
    assert max(held) == held[0] == largest
    assert sum(held) == 30


def test_the_cache_names_a_local_model_without_the_way_to_it(config, checkpoint_folder):
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        list(trainer.steps())
    evaluate_run(config.output, config.pairs[0])
    found = list_entries(reference_cache_folder())
    assert len(found) == 3
    assert {(entry.model, entry.computed_on) for entry in found} == {("base", "cpu float32")}
    for entry in found:
        assert str(checkpoint_folder.parent).encode() not in entry.path.read_bytes()
