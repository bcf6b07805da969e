"""The toy world of film reviews with many prompts: a genre and a subject, such as `horror plot`.

Iterative DPO makes one pair per prompt and round, so that it needs more prompts than subjects.
The genre changes nothing in what people write, and the reward of an answer is that of `reviews`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_dpo import load_policy
from scripts.studies.reporting.study import Row
from scripts.studies.toy.base import make_base
from scripts.studies.toy.exact import AnswerSpace, kl_divergence, optimal_policy
from scripts.studies.toy.reviews import REWARDS, SUBJECTS, WORDS, human_reviews, reward
from scripts.studies.toy.words import Words

GENRES = (
    *("comedy", "drama", "horror", "western", "action", "crime", "war", "fantasy", "mystery"),
    *("romance", "thriller", "musical", "silent", "short", "animated", "noir", "epic", "spy"),
    *("sport", "teen", "family", "heist", "zombie", "indie", "cult", "road", "court", "disaster"),
    *("ghost", "robot", "classic"),
)
VOCABULARY = Words((*SUBJECTS, *WORDS, *GENRES))
SPACE = AnswerSpace(VOCABULARY, WORDS, longest=3)
PROMPTS = tuple(f"{genre} {subject}" for genre in GENRES for subject in SUBJECTS)
# The last genre is held out of preference training.
TRAINING, HELD_OUT = PROMPTS[: -len(SUBJECTS)], PROMPTS[-len(SUBJECTS) :]
# What writers who use few words write, of any subject: none of the best reviews.
PLAIN = {
    **{"fine": 0.35, "dull": 0.35, "good": 0.1, "bad": 0.1},
    **{"not good": 0.05, "not bad": 0.05},
}


def make_reviewer(folder: Path, *, seed: int, steps: int = 300) -> Path:
    """Write the base model, which reviews about as people do; return `folder`."""
    reviews = human_reviews()
    answers = {prompt: reviews[subject_of(prompt)] for prompt in PROMPTS}
    return make_base(folder, VOCABULARY, answers, seed=seed, steps=steps, batch_size=72)


def subject_of(prompt: str) -> str:
    """Return the subject of a prompt."""
    return prompt.split()[-1]


def tilted_reviews(slope: float) -> dict[str, dict[str, float]]:
    """Return reviews by subject, each as frequent as people's times exp(slope × reward)."""
    tilted = {}
    for subject, choices in human_reviews().items():
        weights = {answer: p * np.exp(slope * reward(answer)) for answer, p in choices.items()}
        total = sum(weights.values())
        tilted[subject] = {answer: float(weight / total) for answer, weight in weights.items()}
    return tilted


def true_reward(prompt: Sequence[Mapping[str, Any]], answer: str) -> float:
    """Return the true reward of an answer, as a judge of `mlx-dpo loop`."""
    return float(REWARDS[SPACE.index.get(answer.strip(), len(REWARDS) - 1)])


class Annotator:
    """A judge whose preference between two answers follows the Bradley-Terry model.

    The difference of two Gumbel variables is logistic, so that r(a) + G is above r(b) + G' with
    probability sigmoid(r(a) - r(b)).
    """

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, seed: int) -> None:
        """Draw from a new random stream."""
        self._draw = np.random.default_rng(seed)

    def judge(self, prompt: Sequence[Mapping[str, Any]], answer: str) -> float:
        """Return the true reward plus standard Gumbel noise, drawn at each call."""
        return true_reward(prompt, answer) + float(self._draw.gumbel())


ANNOTATOR = Annotator()


def noisy_reward(prompt: Sequence[Mapping[str, Any]], answer: str) -> float:
    """Return what `ANNOTATOR` thinks of an answer, as a judge of `mlx-dpo loop`."""
    return ANNOTATOR.judge(prompt, answer)


@dataclass(frozen=True)
class World:
    """A base model and exact measurements of policies on the held-out prompts."""

    seed: int
    folder: Path
    model: Path
    reference: np.ndarray  # log-probs of every answer (prompts, answers)
    beta: float  # of the objective: expected reward minus β times the KL divergence

    def optimum(self, beta: float) -> tuple[float, float]:
        """Return expected reward and KL divergence in nats of the optimal policy for β."""
        return self._moments(optimal_policy(self.reference, REWARDS, beta))

    def best_reward(self, kl: float) -> float:
        """Return the largest expected reward of any policy with this KL divergence."""
        low, high = 1e-3, 1e3  # β; the KL divergence falls with it
        for _ in range(60):
            beta = float(np.sqrt(low * high))
            low, high = (beta, high) if self.optimum(beta)[1] > kl else (low, beta)
        return self.optimum(high)[0]

    def _moments(self, logps: np.ndarray) -> tuple[float, float]:
        expected = (np.exp(logps) * REWARDS).sum(axis=-1).mean()
        return float(expected), float(kl_divergence(logps, self.reference).mean())

    def measure(self, policy: nn.Module, **labels: Any) -> Row:
        """Return a row of a policy: `labels`, and its exact reward and KL divergence."""
        expected, kl = self._moments(SPACE.all_logps(policy, HELD_OUT))
        start = self._moments(self.reference)[0]
        best, best_kl = self.optimum(self.beta)
        return {
            "seed": self.seed,
            **labels,
            "reward": expected,
            "kl": kl,
            "largest_reward": self.best_reward(kl),
            "base_reward": start,
            "gain_share": (expected - self.beta * kl - start)
            / (best - self.beta * best_kl - start),
        }

    def coverage(self, pairs: Sequence[Mapping[str, Any]]) -> float:
        """Return the probability of the answers in `pairs` under the optimal policy.

        Mean over the held-out prompts; the answers are those to prompts of the same subject.
        """
        policy = np.exp(optimal_policy(self.reference, REWARDS, self.beta))
        shares = []
        for prompt, row in zip(HELD_OUT, policy, strict=True):
            answers = {
                pair[side]
                for pair in pairs
                for side in ("chosen", "rejected")
                if subject_of(pair["prompt"]) == subject_of(prompt)
            }
            found = [SPACE.index[answer] for answer in answers if answer in SPACE.index]
            shares.append(float(row[found].sum()))
        return float(np.mean(shares))


def make_world(folder: Path, seed: int, beta: float) -> World:
    """Make the base model of a seed."""
    model = make_reviewer(folder / f"base-{seed}", seed=seed)
    reference = SPACE.all_logps(load_policy(None, model=str(model)).model, HELD_OUT)
    return World(seed, folder, model, reference, beta)
