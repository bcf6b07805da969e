"""The example of one file takes the steps of the trainer."""

import json
import runpy
from pathlib import Path

import pytest

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.data.batches.order import PairOrder

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-chat"
PAIRS = MODEL / "preferences" / "train.jsonl"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(ROOT / "examples" / "dpo_in_one_file.py"))


def shuffled_back(rows, *, batch_size, seed):
    """Rows in an order that the trainer's shuffling undoes."""
    steps = len(rows) // batch_size
    places = [
        place
        for step in range(steps)
        for place in PairOrder(count=len(rows), batch_size=batch_size, seed=seed).step(step)
    ]
    return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda both: both[0])]


def test_every_loss_is_that_of_the_trainer(example, tmp_path):
    size, steps = example["BATCH_SIZE"], example["STEPS"]
    lines = PAIRS.read_text(encoding="utf-8").splitlines()[: size * steps]
    rows = [json.loads(line) for line in shuffled_back(lines, batch_size=size, seed=0)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DPOConfig(
        model=str(MODEL),
        pairs=str(tmp_path / "pairs.jsonl"),
        output=str(tmp_path / "run"),
        valid_fraction=0.0,
        epochs=1,
        batch_size=size,
        beta=example["BETA"],
        learning_rate=example["LEARNING_RATE"],
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        lora_r=16,
        lora_alpha=32,
        seed=0,
    )
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        expected = [(row["loss"], row["rewards/accuracies"]) for row in trainer.steps()]
    found = list(example["train"](MODEL, PAIRS))
    assert len(found) == len(expected) == steps
    assert found[0][0] == pytest.approx(0.693147, abs=1e-6)
    assert expected[-1][0] < 0.6  # the policy moved: equal losses are no accident
    losses, accuracies = zip(*found, strict=True)
    expected_losses, expected_accuracies = zip(*expected, strict=True)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    # At step 1 margins are zero but for rounding, and so is what accuracy says.
    assert accuracies[1:] == pytest.approx(expected_accuracies[1:])
