"""Losses and start adapters on the model that ships, through whole runs."""

import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest

from mlx_dpo import DPOConfig, DPOTrainer

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[1] / "models" / "tiny-chat"
NEAR = {"learning_rate": 5e-3, "epochs": 3, "beta": 0.1, "batch_size": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))


def near_duplicates(path, count=400):
    """Pairs that differ in one word: the right answer, and another of its topic."""
    lines = (MODEL / "preferences" / "train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    words = {}
    for row in rows:
        words.setdefault(row["topic"], set()).update(row.get("expects", []))
    rng, pairs = random.Random(0), []
    for row in rows:
        said = row["chosen"][0]["content"]
        right = next(iter(row.get("expects", [])), None)
        others = sorted(words[row["topic"]] - set(row.get("expects", [])))
        if right is None or said.count(right) != 1 or not others:
            continue
        wrong = said.replace(right, rng.choice(others))
        rejected = [{"role": "assistant", "content": wrong}]
        pairs.append({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": rejected})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:count]))
    return str(path)


def trained(tmp_path, name, **settings):
    """The run, and its steps."""
    config = DPOConfig(
        model=str(MODEL), output=str(tmp_path / name), scorer="plain", micro_batch_size=8,
        max_length=128, **settings,
    )  # fmt: skip
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        steps = [row for row in trainer.steps() if "loss" in row]
    return trainer, steps


def chosen_nats(steps):
    """Mean log-ratio of the chosen completions over the last 15 steps."""
    return fmean(row["rewards/chosen"] for row in steps[-15:]) / NEAR["beta"]


def test_dpop_keeps_what_sigmoid_loses_on_near_duplicates_and_the_monitor_names_it(tmp_path):
    pairs = near_duplicates(tmp_path / "near.jsonl")
    plain, lost = trained(tmp_path, "sigmoid", pairs=pairs, loss_type=("sigmoid",), **NEAR)
    assert lost[-1]["rewards/accuracies"] > 0.9
    assert chosen_nats(lost) < -1
    [warning] = [w for w in plain.warnings if "lose likelihood while the margin grows" in w]
    assert "`sft`" in warning and "`dpop`" in warning
    for name, loss in (("dpop", ("dpop",)), ("mixed", ("sigmoid", "sft"))):
        trainer, kept = trained(tmp_path, name, pairs=pairs, loss_type=loss, **NEAR)
        assert chosen_nats(kept) > 0, name
        assert fmean(row["rewards/margins"] for row in kept[-15:]) > 0.05, name
        assert not [w for w in trainer.warnings if "lose likelihood" in w]


def test_dpo_goes_on_from_an_adapter_of_sft(tmp_path):
    pairs = str(MODEL / "preferences")
    sft, steps = trained(
        tmp_path, "sft", pairs=pairs, loss_type=("sft",), learning_rate=1e-3, max_steps=20
    )
    assert fmean(r["loss"] for r in steps[-5:]) < 0.95 * fmean(r["loss"] for r in steps[:5])
    dpo, steps = trained(
        tmp_path, "dpo", pairs=pairs, learning_rate=1e-3, max_steps=30,
        start_adapter=str(sft.paths.folder),
    )  # fmt: skip
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    # The reference is the model with the adapter, not the base.
    before = sft.evaluation["eval_logps/chosen"]
    held_out = dpo.reference["valid"].chosen.mean().item()
    assert held_out == pytest.approx(before, abs=1e-2)
    assert dpo.evaluation["eval_rewards/accuracies"] > 0.9
