"""Micro-batches of a run: their limits, the line in the header, and passes without gradients."""

import re
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dpo import DPOConfig, DPOTrainer, evaluate_run
from mlx_dpo.config.training import PassLimit
from mlx_dpo.paths import reference_cache_folder
from mlx_dpo.runs.build import (
    INFERENCE_FACTOR,
    INFERENCE_TOKENS,
    inference_limit,
    make_dataset_scorer,
)
from mlx_dpo.runs.folder import reference_provenance
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


def test_the_header_describes_a_micro_batch(config, tmp_path):
    """9 pairs in steps of 4, 4 and 1: 2 + 2 + 1 micro-batches."""
    trainer, [line] = prepared(replace(config, scorer="shared"))
    text = r"up to 2 pairs, about 1.7 per step; (\d+) tokens on average, (.*)% padding"
    header_line = re.fullmatch(text, line)
    real = sum(map(tokens, trainer.inputs.train))
    total = real / (1 - float(header_line[2]) / 100)
    assert int(header_line[1]) == pytest.approx(total / 5, rel=0.02)
    trainer, [line] = prepared(replace(config, output=str(tmp_path / "trie")))
    shared = re.fullmatch(text + r", (.*)% saved by shared beginnings", line)
    assert shared[2] == "0.0"
    assert int(shared[1]) == pytest.approx(real / 5 * (1 - float(shared[3]) / 100), rel=0.02)
    assert float(shared[3]) > 5  # all prompts begin with «What is »


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


ALIKE = [TokenizedPair((1,), (2, 3), (4, 5))] * 1000  # three tokens go through the layers


@pytest.mark.parametrize(
    ("setting", "name", "recompute", "device", "largest"),
    [
        ("shared", "shared", False, "metal", 3 * INFERENCE_FACTOR),
        ("shared", "shared", True, "metal", 3),
        ("shared", "shared", False, "cpu", 3),
        ("auto", "plain", False, "metal", 3),
        ("auto", "plain", False, "cpu", 3),
        ("auto", "shared", False, "cpu", INFERENCE_TOKENS["cpu"] // 3),
        ("auto", "shared", True, "cpu", INFERENCE_TOKENS["cpu"] // 3),
    ],
)
def test_passes_without_gradients_are_limited_by_tokens(
    setting, name, recompute, device, largest, monkeypatch
):
    monkeypatch.setattr("mlx_dpo.runs.build.is_cpu", lambda: device == "cpu")
    monkeypatch.setattr("mlx_dpo.runs.build.device_kind", lambda: device)
    held = []

    def scorer(model, pairs):
        held.append(len(pairs))
        return PairLogps(mx.zeros((len(pairs),)), mx.zeros((len(pairs),)))

    class Model:
        def eval(self):
            pass

    config = DPOConfig(micro_batch_size=3, recompute=recompute, scorer=setting)
    score = make_dataset_scorer(
        config, ScorerChoice(scorer, scorer, name, "", None if name == "plain" else "row")
    )
    score(Model(), ALIKE)
    assert max(held) == held[0] == largest
    assert sum(held) == len(ALIKE)


@pytest.mark.parametrize(
    ("length", "recompute", "tokens"),
    [
        (10, False, INFERENCE_TOKENS["cpu"]),  # short texts always share a pass
        (500, False, INFERENCE_FACTOR * 2 * 501),  # twice 500 tokens in training
        (500, True, 2 * 501),
        (2000, False, INFERENCE_TOKENS["metal"]),
    ],
)
def test_passes_without_gradients_on_a_gpu_fit_as_those_of_training_do(
    length, recompute, tokens, monkeypatch
):
    monkeypatch.setattr("mlx_dpo.runs.build.device_kind", lambda: "metal")
    monkeypatch.setattr("mlx_dpo.runs.build.is_cpu", lambda: False)
    config = DPOConfig(micro_batch_size=2, recompute=recompute)
    pairs = [TokenizedPair((1,) * (length - 1), (2, 3), (4, 5))] * 9 + ALIKE[:9]
    choice = ScorerChoice(None, None, "shared", "", "row")
    assert inference_limit(config, choice, pairs) == PassLimit(tokens=tokens)


def test_a_limit_of_tokens_in_the_settings_holds_without_gradients():
    choice = ScorerChoice(None, None, "shared", "", "row")
    config = DPOConfig(micro_batch_tokens=60)
    assert inference_limit(config, choice, ALIKE) == PassLimit(tokens=60)


def test_reference_log_probs_do_not_depend_on_the_limit_of_a_pass(config, monkeypatch):
    found = []
    for limit in (PassLimit(tokens=512), PassLimit(pairs=1)):
        monkeypatch.setattr("mlx_dpo.runs.build.inference_limit", lambda *_, limit=limit: limit)
        trainer, _ = prepared(replace(config, output=f"{config.output}-{limit.pairs}"))
        found.append(trainer.reference["train"])
        [entry.path.unlink() for entry in list_entries(reference_cache_folder())]
    for together, alone in zip(*found, strict=True):
        assert mx.allclose(together, alone, rtol=1e-6, atol=1e-6)


def test_caches_of_passes_by_pairs_are_not_read_for_passes_by_tokens(config):
    """The setting `shared` keeps its results, bit for bit, whatever other runs have scored."""
    keys = set()
    for name in ("auto", "shared"):
        with DPOTrainer(replace(config, scorer=name, output=f"{config.output}-{name}")) as trainer:
            trainer.load()
            trainer.attach()
            keys.add(reference_provenance(trainer.record, "cpu float32"))
    assert len(keys) == 2


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
