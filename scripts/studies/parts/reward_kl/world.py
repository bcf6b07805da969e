"""The data of the reward-KL study: sampled answers, labelled pairs, and exact measurements."""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo import load_policy
from mlx_dpo.evaluation.measurements.rouge import rouge_l
from scripts.studies.baselines.answer_tokens import AnswerTokens, decode_answers, encode_answers
from scripts.studies.baselines.reward_model import TokenPairs
from scripts.studies.reporting.study import Row
from scripts.studies.toy.bradley_terry import preference
from scripts.studies.toy.exact import kl_divergence
from scripts.studies.toy.reviews import (
    LOWEST,
    REWARDS,
    SPACE,
    SUBJECTS,
    VOCABULARY,
    human_reviews,
    make_reviewer,
)

GROUP = 4  # answers sampled at a time, of which every two are a pair
LENGTH = SPACE.longest + 1  # tokens of the longest answer, with its end
REWARD_OF = dict(zip(SPACE.answers, map(float, REWARDS), strict=True))


class Pair(NamedTuple):
    """A labelled pair of answers."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class World:
    """A base model, pairs of its answers, and what measurements compare with.

    Attributes:
        model: folder of the base model.
        reference: log-probs of all answers of the base model. (prompts, answers)
        pairs: pairs to train on.
        held_out: pairs that no method is trained on.
        sampled_tokens: tokens of the sampled answers of which `pairs` are made.
    """

    seed: int
    model: Path
    reference: np.ndarray
    pairs: Sequence[Pair]
    held_out: Sequence[Pair]
    sampled_tokens: int

    def measure(self, logps: np.ndarray) -> Row:
        """Return exact measurements of a policy from its log-probs. (prompts, answers)

        `rouge_l` compares the most probable answer with the chosen ones of the held-out pairs;
        `perplexity` is that of people's reviews, per token.
        """
        best = dict(zip(SUBJECTS, (SPACE.answers[i] for i in logps.argmax(axis=-1)), strict=True))
        return {
            "reward": float((np.exp(logps) @ REWARDS).mean()),
            "kl": float(kl_divergence(logps, self.reference).mean()),
            "rouge_l": float(np.mean([rouge_l(best[p.prompt], p.chosen) for p in self.held_out])),
            "perplexity": review_perplexity(logps),
        }


def make_world(folder: Path, seed: int, groups: int, held_out: int) -> World:
    """Make a base model, and pairs of `groups` groups of its answers per prompt."""
    model = make_reviewer(folder / f"base-{seed}", seed=seed)
    base = load_policy(None, model=str(model)).model
    reference = SPACE.all_logps(base, SUBJECTS)
    draw = np.random.default_rng(1000 + seed)
    answers = {
        subject: sample_groups(logps, groups + held_out, draw)
        for subject, logps in zip(SUBJECTS, reference, strict=True)
    }
    pairs, others = (
        [pair for subject in SUBJECTS for pair in label(subject, answers[subject][part], draw)]
        for part in (slice(groups), slice(groups, None))
    )
    used = [answer for chosen in answers.values() for group in chosen[:groups] for answer in group]
    tokens = sum(len(VOCABULARY.answer_ids(answer)) for answer in used)
    return World(seed, model, reference, pairs, others, tokens)


def sample_groups(
    logps: np.ndarray, groups: int, draw: np.random.Generator
) -> Sequence[Sequence[str]]:
    """Sample groups of answers from their exact distribution, without those that have no end."""
    chances = np.exp(logps[:-1])
    chosen = draw.choice(len(chances), (groups, GROUP), p=chances / chances.sum())
    return [[SPACE.answers[index] for index in group] for group in chosen]


def label(
    prompt: str, groups: Iterable[Sequence[str]], draw: np.random.Generator
) -> Iterator[Pair]:
    """Yield every pair of different answers of a group, labelled by the Bradley-Terry model."""
    for group in groups:
        for first, second in combinations(group, 2):
            if first == second:
                continue
            chance = preference(REWARD_OF[first] - REWARD_OF[second])
            prefers_first = draw.random() < chance
            yield Pair(prompt, *((first, second) if prefers_first else (second, first)))


def as_tokens(pairs: Sequence[Pair]) -> TokenPairs:
    """Encode pairs."""
    prompts = [pair.prompt for pair in pairs]
    return TokenPairs(
        encode_answers(VOCABULARY, prompts, [pair.chosen for pair in pairs], LENGTH),
        encode_answers(VOCABULARY, prompts, [pair.rejected for pair in pairs], LENGTH),
    )


def has_text(batch: AnswerTokens) -> list[bool]:
    """Return whether answers have an end within `LENGTH` tokens, and no special token."""
    return [text in REWARD_OF for text in decode_answers(VOCABULARY, batch)]


def true_scores(batch: AnswerTokens) -> mx.array:
    """Return the true rewards of answers; an answer without an end has the lowest. (B,)"""
    return mx.array([REWARD_OF.get(text, LOWEST) for text in decode_answers(VOCABULARY, batch)])


def review_perplexity(logps: np.ndarray) -> float:
    """Return the perplexity per token of people's reviews, exactly."""
    nats = tokens = 0.0
    for reviews, row in zip(human_reviews().values(), logps, strict=True):
        for review, chance in reviews.items():
            nats -= chance * row[SPACE.index[review]]
            tokens += chance * len(VOCABULARY.answer_ids(review))
    return float(np.exp(nats / tokens))


class Progress(NamedTuple):
    """The state of a method after a step: the policy, and what it cost up to here."""

    step: int
    policy: nn.Module
    sampled_tokens: int
    trained_tokens: int


def measure_steps(world: World, steps: Iterable[Progress], points: Iterable[int]) -> Iterator[Row]:
    """Yield a row per step in `points`; measurements add nothing to seconds and memory.

    `peak_mb` is MLX's peak memory beyond what was in use before the method began.
    """
    points, seconds, peak = set(points), 0.0, 0
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    for progress in steps:
        if progress.step not in points:
            continue
        seconds += time.perf_counter() - start
        peak = max(peak, mx.get_peak_memory() - before)
        yield {
            "step": progress.step,
            **world.measure(SPACE.all_logps(progress.policy, SUBJECTS)),
            "seconds": seconds,
            "sampled_tokens": progress.sampled_tokens,
            "trained_tokens": progress.trained_tokens,
            "peak_mb": peak / 1e6,
        }
        mx.reset_peak_memory()
        start = time.perf_counter()
