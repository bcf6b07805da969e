"""Train on all pairs of a few answers: on expected labels, and on counted ones."""

from collections.abc import Iterator, Sequence
from itertools import permutations

import mlx.nn as nn
import numpy as np

from mlx_dpo import load_policy
from scripts.studies.parts.label_noise.methods import (
    ACCURACY,
    BETA,
    ERROR,
    METHODS,
    returns,
    root_mean_square,
)
from scripts.studies.reporting.study import Row, Scale
from scripts.studies.toy import bradley_terry as bt
from scripts.studies.toy.base import make_base
from scripts.studies.toy.exact import all_answer_logps, normalize, total_variation
from scripts.studies.toy.train import train
from scripts.studies.toy.words import Words

VOCABULARY = Words(("red", "blue", "green", "sky", "sea", "leaf"))
PROMPTS = ("sky", "sea", "leaf")
ANSWERS = tuple(" ".join(pair) for pair in permutations(("red", "blue", "green"), 2))
WORD_STEPS, WORD_RATE = 150, 3e-3
LABELS = 200  # of each unordered pair, where labels are counted


def run_words(scale: Scale, seed: int, rates: Sequence[float]) -> Iterator[Row]:
    """Train on all pairs of six answers: on expected labels, and robustly on counted ones."""
    draw = np.random.default_rng(seed)
    probabilities = draw.dirichlet(np.full(len(ANSWERS), 3.0), len(PROMPTS))
    rewards = draw.uniform(-1, 1, probabilities.shape)
    answers = {
        prompt: dict(zip(ANSWERS, map(float, row), strict=True))
        for prompt, row in zip(PROMPTS, probabilities, strict=True)
    }
    base = make_base(scale.folder / f"words-{seed}", VOCABULARY, answers, seed=seed)
    reference = word_logps(load_policy(None, model=str(base)).model)
    clean = bt.preferences(rewards)
    for rate in rates:
        expected = bt.flip(clean, rate)
        names = METHODS if rate else ("dpo", "ipo")
        runs = [("expected", name, expected) for name in names]
        counted = count_labels(expected, seed)
        runs.append(("counted", "rdpo" if rate else "dpo", counted))
        for form, name, shares in runs:
            output = scale.folder / f"{form}-{seed}-{rate}-{name}"
            pairs = bt.weighted_pairs(PROMPTS, ANSWERS, shares)
            policy = train(base, pairs, output, **word_settings(name, rate), seed=seed)
            logps = word_logps(policy)
            minimum = np.stack([METHODS[name].scores(row, rate) for row in shares])
            facts = {"seed": seed, "form": form, "method": name, "flipped": rate, "assumed": rate}
            yield {
                **facts,
                **returns(logps, reference, rewards),
                "distance": total_variation(logps, normalize(reference + minimum)).max(),
                **(score_error(logps - reference, rewards, rate) if form == "counted" else ERROR),
                **ACCURACY,
            }


def word_logps(model: nn.Module) -> np.ndarray:
    """Return the log-probs of the six answers, normalized over them. (prompts, answers)"""
    return normalize(all_answer_logps(model, VOCABULARY, PROMPTS, ANSWERS))


def word_settings(name: str, rate: float) -> Row:
    """Return the settings of training on all ordered pairs in one batch."""
    pairs = len(PROMPTS) * len(ANSWERS) * (len(ANSWERS) - 1)
    return METHODS[name].settings(rate) | {
        "weight_column": "share",
        "batch_size": pairs,
        "micro_batch_size": pairs,
        "max_steps": WORD_STEPS,
        "learning_rate": WORD_RATE,
        "lr_scheduler_type": "cosine",
    }


def count_labels(shares: np.ndarray, seed: int) -> np.ndarray:
    """Return the shares of `LABELS` labels drawn for each unordered pair. (prompts, n, n)"""
    upper = np.triu(np.random.default_rng(200 + seed).binomial(LABELS, shares) / LABELS, 1)
    return upper + np.tril(1 - upper.transpose(0, 2, 1), -1)


def score_error(log_ratios: np.ndarray, rewards: np.ndarray, rate: float) -> Row:
    """Return the RMS error of the implicit reward, and the error that theory predicts."""
    found, true = BETA * log_ratios, rewards
    error = (found - found.mean(1, keepdims=True)) - (true - true.mean(1, keepdims=True))
    predicted = [bt.score_errors(row, rate, LABELS) for row in rewards]
    return {"error": root_mean_square(error), "predicted_error": root_mean_square(predicted)}
