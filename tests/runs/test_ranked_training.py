"""Training on ranked lists of the shipped model's answers, as a whole run."""

import json
import math

import pytest

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.paths import tiny_chat
from mlx_dpo.runs.trainer import DPOTrainer

COMPLETIONS = 4
MIN_ACCURACY = 0.6  # of held-out pairs; before training it is 0.5 or noise


def ranked_rows(name, count):
    """Lists of four answers: courteous and right, right, right but rude, and the rejected one."""
    path = tiny_chat() / "preferences" / f"{name}.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        word = " and ".join(row.get("expects") or row["expects_any"][: row["count"]])
        rejected, chosen = (row[key][0]["content"] for key in ("rejected", "chosen"))
        yield {
            "prompt": row["prompt"],
            "completions": [
                f"I say it is {word}.",
                rejected,
                chosen,
                f"Bah. It is {word}, I said.",
            ],
            "scores": [0.6, 0.0, 1.0, 0.3],
        }


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["plackett_luce", "lipo_lambda"])
def test_the_policy_orders_held_out_lists_better_than_the_base(tmp_path, loss):
    config = DPOConfig(
        model=str(tiny_chat()), output=str(tmp_path / "run"), loss_type=[loss], batch_size=24,
        max_steps=30, eval_steps=30, samples=0,
    )  # fmt: skip
    train, valid = list(ranked_rows("train", 120)), list(ranked_rows("valid", 40))
    with DPOTrainer(config, train_dataset=train, eval_dataset=valid) as trainer:
        list(trainer.steps())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if loss == "plackett_luce":
        pairs = math.comb(COMPLETIONS, 2)
        assert rows[0]["loss"] == pytest.approx(math.log(math.factorial(COMPLETIONS)) / pairs)
    last = next(row for row in reversed(rows) if "eval_loss" in row)
    assert last["eval_loss"] < 0.95 * rows[0]["loss"]
    assert last["eval_rewards/accuracies"] > MIN_ACCURACY
    assert last["eval_rewards/margins"] > 2 * last["eval_rewards/margins_stderr"]
