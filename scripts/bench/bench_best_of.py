"""Measure best-of-N by implicit rewards: the share of polite answers of the shipped model.

    python -m scripts.bench.bench_best_of RUN [--answers 8] [--seeds 3]

RUN is a run on the shipped model, such as that of `mlx-dpo demo`. Base and policy answer the
held-out prompts of `models/tiny-chat` N times; a line for each has the share of polite and of
correct answers (rules of the demo) of all answers, and of those with the highest reward.
"""

import argparse
from statistics import fmean
from typing import Any

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.data.sources import read_rows
from mlx_dpo.demo.rules import courteous_markers, is_correct, is_courteous
from mlx_dpo.evaluation.run_reward import open_run_reward
from mlx_dpo.paths import tiny_chat
from mlx_dpo.saved_runs.open import open_switchable
from mlx_dpo.saved_runs.respond import ModelResponder


def shares(texts: list[str], rows: list[dict[str, Any]]) -> str:
    """Return the shares of polite and of correct answers as text."""
    markers = courteous_markers(tiny_chat())
    polite = fmean(is_courteous(text, markers) for text in texts)
    correct = fmean(is_correct(text, row) for text, row in zip(texts, rows, strict=True))
    return f"{polite:.1%} polite, {correct:.1%} correct"


def main() -> None:
    """Measure, and print a line for base and policy with each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    rows = [row.record for row in read_rows(tiny_chat() / "preferences" / "valid.jsonl")]
    prompts = [make_prompt(tuple(row["prompt"]), "prompt") for row in rows]
    opened = open_switchable(given.run)
    judge = open_run_reward(f"run:{given.run}", opened)
    responder = ModelResponder(opened.base, {})
    for state in ("base", "aligned"):
        for seed in range(given.seeds):
            sampling = Sampling(temperature=1.0, max_tokens=64, seed=seed)
            with opened.switch.activated(state):
                repeated = [prompt for prompt in prompts for _ in range(given.answers)]
                replies = [reply.text for reply in responder.reply(repeated, sampling)]
            groups = [
                replies[start : start + given.answers]
                for start in range(0, len(replies), given.answers)
            ]
            rankings = judge.rank([prompt.messages for prompt in prompts], groups)
            best = [texts[ranking.best] for texts, ranking in zip(groups, rankings, strict=True)]
            every = shares(replies, [row for row in rows for _ in range(given.answers)])
            print(f"{state}, seed {seed}: {every}; best of {given.answers}: {shares(best, rows)}")


if __name__ == "__main__":
    main()
