"""Train the package's losses on exactly weighted rows; return measured values and closed forms."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dpo import load_policy
from scripts.studies.parts.optimum_other_losses.losses import (
    LOGP_PER_TOKEN,
    REWARDS,
    PairLoss,
    settings,
)
from scripts.studies.reporting.study import Row, Scale
from scripts.studies.toy import population
from scripts.studies.toy.base import make_base
from scripts.studies.toy.bradley_terry import flip
from scripts.studies.toy.exact import all_answer_logps
from scripts.studies.toy.population import logit
from scripts.studies.toy.train import train
from scripts.studies.toy.words import Words

PROMPTS = ("sky", "sea", "leaf", "sun", "moon")
VOCABULARY = Words(("red", "blue", "green", *PROMPTS))
# Answers that begin other answers: only the log-prob of the end distinguishes them.
ANSWERS = ("red", "red blue", "red blue green", "blue", "green red", "green green")
TOKENS = np.array([len(VOCABULARY.answer_ids(answer)) for answer in ANSWERS])
# The compared answers of each prompt: a, which is preferred with the probability below, and b.
PAIRS = np.array([(0, 1), (1, 2), (2, 1), (4, 5), (3, 0)])
PREFERRED = np.array([0.55, 0.65, 0.75, 0.85, 0.95])
SHARE_A, SHARE_B = 0.06, 0.44  # of the base model: it rarely gives the preferred answer
DESIRABLE = np.array([0.1, 0.25, 0.4, 0.6, 0.9])  # probability of the label, for KTO
KTO_WEIGHTS = ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0))  # of desirable and undesirable answers
DIVERGENCES = {"forward_kl": 3e-4, "js_divergence": 1e-3, "alpha_divergence": 1e-3}  # rates
LISTED = 2  # prompts whose six answers are all compared
STEPS, RATE = 250, 3e-3
KTO_BETA, KTO_STEPS, KTO_RATE = 0.1, 200, 3e-4
SCORES, LOG_RATIO, SHARE = "βf′", "r", "share of a"
Logps = np.ndarray


def make_model(folder: Path, seed: int) -> Path:
    """Write a base model that prefers b to a, and gives the other answers, too."""
    draw, answers = np.random.default_rng(seed), {}
    for prompt, (a, b) in zip(PROMPTS, PAIRS, strict=True):
        rest = draw.dirichlet(np.full(len(ANSWERS) - 2, 3.0)) * (1 - SHARE_A - SHARE_B)
        shares = np.insert(rest, sorted((a, b - (b > a))), 0.0)
        shares[a], shares[b] = SHARE_A, SHARE_B
        answers[prompt] = dict(zip(ANSWERS, map(float, shares), strict=True))
    return make_base(folder / f"base-{seed}", VOCABULARY, answers, seed=seed)


class Trainer:
    """Trains the base model of a seed, and measures exact log-probs of all answers."""

    def __init__(self, scale: Scale, seed: int) -> None:
        self.folder, self.seed, self.runs = scale.folder, seed, 0
        self.model = make_model(scale.folder, seed)
        self.reference = self._logps(load_policy(None, model=str(self.model)).model)

    def train(self, rows: Sequence[Row], **more: Any) -> Logps:
        """Train on all rows at each step; return log π of all answers. (prompts, answers)"""
        self.runs += 1
        policy = train(
            self.model,
            rows,
            self.folder / f"run-{self.seed}-{self.runs}",
            **{
                "weight_column": "probability",
                "batch_size": len(rows),
                "micro_batch_size": len(rows),
                "max_steps": STEPS,
                "learning_rate": RATE,
                "lr_scheduler_type": "cosine",
                "seed": self.seed,
                **more,
            },
        )
        return self._logps(policy)

    def _logps(self, model: Any) -> Logps:
        return all_answer_logps(model, VOCABULARY, PROMPTS, ANSWERS)


def compared(prompt: int, chosen: int, rejected: int, probability: float) -> Row:
    """Return a row of training data: a pair and the probability of its label."""
    return {
        "prompt": PROMPTS[prompt],
        "chosen": ANSWERS[chosen],
        "rejected": ANSWERS[rejected],
        "probability": float(probability),
    }


def result(loss: str, beta: float, prompt: int, answer: int, p: float, **values: Any) -> Row:
    """Return a row of the study, without its seed."""
    names = {"prompt": PROMPTS[prompt], "answer": ANSWERS[answer], "probability": float(p)}
    return {"loss": loss, "beta": beta, **names, **values}


def run_pairs(trainer: Trainer, loss: PairLoss) -> Iterator[Row]:
    """Train on one pair per prompt; yield what is measured and its closed form."""
    rows = []
    for prompt, (a, b) in enumerate(PAIRS):
        p = flip(PREFERRED[prompt], loss.flipped)
        rows += [compared(prompt, a, b, p), compared(prompt, b, a, 1 - p)]
    logps = trainer.train(rows, **loss.settings)
    ratios = logps if loss.quantity == LOGP_PER_TOKEN else logps - trainer.reference
    values = loss.beta * (ratios / TOKENS if "per token" in loss.quantity else ratios)
    make = partial(result, loss.name, loss.beta)
    for prompt, ((a, b), p) in enumerate(zip(PAIRS, PREFERRED, strict=True)):
        sides = ((a, values[prompt, a] - values[prompt, b], p),)
        if loss.quantity == REWARDS:
            sides = ((a, values[prompt, a], p), (b, values[prompt, b], 1 - p))
        for answer, value, q in sides:
            optimum = float(loss.optimum(np.array(q)))
            yield make(
                prompt, answer, q, quantity=loss.quantity, measured=float(value), expected=optimum
            )
    if loss.name == "DPO":
        for prompt, p in enumerate(PREFERRED):
            expected = logit(p) / loss.beta + margin_of(trainer.reference, prompt)
            yield share(make, logps, prompt, p, float(1 / (1 + np.exp(-expected))))


def margin_of(logps: Logps, prompt: int) -> float:
    """Return log π(a) - log π(b) of a prompt."""
    a, b = PAIRS[prompt]
    return float(logps[prompt, a] - logps[prompt, b])


def share(make: Callable[..., Row], logps: Logps, prompt: int, p: float, expected: float) -> Row:
    """Return a row with π(a) / (π(a) + π(b))."""
    measured = float(1 / (1 + np.exp(-margin_of(logps, prompt))))
    a = int(PAIRS[prompt, 0])
    return make(prompt, a, p, quantity=SHARE, measured=measured, expected=expected)


def run_answers(
    trainer: Trainer, name: str, beta: float, preferences: np.ndarray, **more: Any
) -> Iterator[Row]:
    """Train on all pairs of six answers; yield IPO's log-ratios per token or DPO's f-scores.

    Args:
        preferences: probability that an answer is preferred to another. (prompts, K, K)
    """
    pairs = list(permutations(range(len(ANSWERS)), 2))
    rows = [
        compared(prompt, chosen, rejected, table[chosen, rejected])
        for prompt, table in enumerate(preferences)
        for chosen, rejected in pairs
    ]
    ratios = (trainer.train(rows, beta=beta, **more) - trainer.reference)[:LISTED]
    if name == "IPO, six answers":
        scores, expected = ratios / TOKENS, population.ipo_scores(preferences)
        quantity = "βr per token"
    else:
        scores, expected = population.divergence_scores(name, ratios), draw_rewards(trainer.seed)
        quantity = SCORES
    for (prompt, answer), value in np.ndenumerate(beta * (scores - scores.mean(1, keepdims=True))):
        yield result(
            name,
            beta,
            prompt,
            answer,
            preferences[prompt, answer].mean(),
            quantity=quantity,
            measured=float(value),
            expected=float(expected[prompt, answer] - expected[prompt].mean()),
        )


def draw_rewards(seed: int) -> np.ndarray:
    """Return known rewards from -1 to 1. (prompts, answers)"""
    return np.random.default_rng(100 + seed).uniform(-1, 1, (LISTED, len(ANSWERS)))


def draw_preferences(seed: int) -> np.ndarray:
    """Return any preferences, which may have cycles and follow no rewards. (prompts, K, K)"""
    size = len(ANSWERS)
    upper = np.triu(np.random.default_rng(200 + seed).uniform(0, 1, (LISTED, size, size)), 1)
    return upper + np.tril(1 - upper.swapaxes(1, 2), -1) + 0.5 * np.eye(size)


def labelled(prompt: int, answer: int, q: float) -> list[Row]:
    """Return both labels of an answer, weighted by their probabilities."""
    row = {"prompt": PROMPTS[prompt], "completion": ANSWERS[answer]}
    return [row | {"label": label, "probability": float(w)} for label, w in ((1, q), (0, 1 - q))]


def run_kto(trainer: Trainer, weights: tuple[float, float]) -> Iterator[Row]:
    """Train KTO on one labelled answer per prompt; yield its log-ratio and the direction."""
    rows = [
        row
        for prompt, (a, q) in enumerate(zip(PAIRS[:, 0], DESIRABLE, strict=True))
        for row in labelled(prompt, a, q)
    ]
    chosen = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    ratios = train_kto(trainer, rows, **chosen) - trainer.reference
    threshold = population.kto_threshold(*weights)
    for prompt, (a, q) in enumerate(zip(PAIRS[:, 0], DESIRABLE, strict=True)):
        yield result(
            f"KTO, λ {weights[0]:g} : {weights[1]:g}",
            KTO_BETA,
            prompt,
            a,
            q,
            quantity=LOG_RATIO,
            measured=float(ratios[prompt, a]),
            expected=float(np.sign(q - threshold)),
        )


def run_contradictions(trainer: Trainer) -> Iterator[Row]:
    """Train KTO on both answers of each pair: the preferred one is desirable."""
    rows: list[Row] = []
    for prompt, ((a, b), p) in enumerate(zip(PAIRS, PREFERRED, strict=True)):
        rows += labelled(prompt, a, p) + labelled(prompt, b, 1 - p)
    logps = train_kto(trainer, rows)
    for prompt, p in enumerate(PREFERRED):
        yield share(partial(result, "KTO, pairs", KTO_BETA), logps, prompt, p, 1.0)


def train_kto(trainer: Trainer, rows: Sequence[Row], **weights: float) -> Logps:
    """Train KTO on labelled rows; return log π of all answers. (prompts, answers)"""
    return trainer.train(
        rows,
        **settings("kto", KTO_BETA, **weights),
        max_steps=KTO_STEPS,
        learning_rate=KTO_RATE,
        lr_scheduler_type="constant",
    )
