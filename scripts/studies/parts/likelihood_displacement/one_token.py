"""Train on one pair of one-word answers at a time, and see where the probability goes."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_dpo import load_policy
from scripts.studies.reporting.study import Row, Scale
from scripts.studies.toy.base import tune_base
from scripts.studies.toy.exact import next_token_logps, rank_correlation
from scripts.studies.toy.similar_words import (
    HEAD,
    HEAD_LENGTH,
    set_word_rows,
    similar_vectors,
)
from scripts.studies.toy.train import train_by_steps
from scripts.studies.toy.words import Words, write_checkpoint

PROMPTS = ("first", "second", "third", "fourth")
# Five groups of four words; within a group they are less and less similar.
GROUPS = (
    ("no", "never", "nope", "hardly"),
    ("yes", "always", "sure", "surely"),
    ("red", "crimson", "pink", "orange"),
    ("big", "large", "tall", "wide"),
    ("cat", "kitten", "dog", "horse"),
)
SPREADS = (0.1, 0.2, 0.4, 0.8)
WORDS = tuple(word for group in GROUPS for word in group)
VOCABULARY = Words((*PROMPTS, *WORDS))
DIMENSIONS = 48
# `no` and `never` differ along a direction in which `yes`, opposite in meaning, extends further.
DIFFERENCE, SHARE_OF_YES = 0.15, 0.5
BETA, RATE, STEPS, EVERY = 0.1, 1e-4, 50, 10
SCENE = ("no", "never")


class Example(NamedTuple):
    """A base model, its LM head's rows of all tokens, and a pair of words."""

    model: Path
    head: np.ndarray  # (tokens, dimensions)
    prompt: str
    chosen: str
    rejected: str


def head_rows(seed: int) -> dict[str, np.ndarray]:
    """Return the row of each word in the LM head. (dimensions,)"""
    draw = np.random.default_rng([seed, 1])
    rows = {}
    for group in GROUPS:
        vectors = similar_vectors(draw, SPREADS, DIMENSIONS)
        rows |= dict(zip(group, HEAD_LENGTH * vectors, strict=True))
    basis = np.linalg.qr(draw.normal(size=(DIMENSIONS, 2)))[0].T
    meaning, other = HEAD_LENGTH * basis
    common = np.sqrt(1 - DIFFERENCE**2) * meaning
    rows["no"], rows["never"] = common + DIFFERENCE * other, common - DIFFERENCE * other
    rows["yes"] = -np.sqrt(1 - SHARE_OF_YES**2) * meaning + SHARE_OF_YES * other
    return rows


def make_model(folder: Path, seed: int) -> Path:
    """Write a base model that gives each answer of one word with an uneven probability."""
    draw = np.random.default_rng([seed, 2])
    random = folder / f"words-{seed}-random"
    write_checkpoint(random, VOCABULARY, seed=seed, hidden=DIMENSIONS)
    set_word_rows(random, VOCABULARY, HEAD, head_rows(seed))
    answers = [
        {"prompt": prompt, "completion": word, "probability": float(share)}
        for prompt in PROMPTS
        for word, share in zip(WORDS, draw.dirichlet(np.ones(len(WORDS))), strict=True)
    ]
    return tune_base(folder / f"words-{seed}", random, answers, seed=seed, steps=200)


def pairs() -> Iterator[tuple[str, str]]:
    """Yield a chosen and a rejected word: three pairs of each group, and one across groups."""
    for index, group in enumerate(GROUPS):
        yield from pairwise(group)
        yield group[0], GROUPS[(index + 2) % len(GROUPS)][0]


def slope_term(head: np.ndarray, probabilities: np.ndarray, chosen: int, rejected: int) -> float:
    """Return what makes log π(y⁺) fall by the theory: larger values, a steeper fall.

        ⟨W⁺, W⁻⟩ - ‖W⁺‖² + Σ_z π(z) ⟨W_z, W⁺ - W⁻⟩

    This is minus the derivative of log π(y⁺) along W⁺ - W⁻, the direction in which the gradient
    moves the hidden embedding.

    Source: Razin et al. 2024, arXiv:2410.08847, on the likelihood of one-token answers.
    """
    direction = head[chosen] - head[rejected]
    return float(probabilities @ (head @ direction) - head[chosen] @ direction)


def measure(example: Example, output: Path, *, seed: int) -> Iterator[Row]:
    """Train on a pair; yield a row at the start, every few steps, and at the end."""
    ids = VOCABULARY.ids
    chosen, rejected = ids[example.chosen], ids[example.rejected]
    start = [VOCABULARY.prompt_ids(example.prompt)]
    reference = next_token_logps(load_policy(None, model=str(example.model)).model, start)[0]
    head = example.head
    alignment = head @ (head[chosen] - head[rejected])
    others = np.setdiff1d(np.arange(len(head)), [chosen, rejected])
    cosine = head[chosen] @ head[rejected]
    cosine /= np.linalg.norm(head[chosen]) * np.linalg.norm(head[rejected])
    term = slope_term(head, np.exp(reference), chosen, rejected)

    def describe(step: int, logps: np.ndarray) -> Row:
        change = logps - reference
        gains = np.exp(logps[others]) - np.exp(reference[others])
        gainer = others[int(np.argmax(gains))]
        return {
            "prompt": example.prompt,
            "chosen": example.chosen,
            "rejected": example.rejected,
            "step": step,
            "cosine": float(cosine),
            "theory": term,
            "chosen_probability": float(np.exp(logps[chosen])),
            "rejected_probability": float(np.exp(logps[rejected])),
            "chosen_change": float(change[chosen]),
            "margin": float(change[chosen] - change[rejected]),
            "gainer": WORDS[gainer - ids[WORDS[0]]] if gainer >= ids[WORDS[0]] else "(no word)",
            "gainer_probability": float(np.exp(logps[gainer])),
            "gainer_rank": 1 + int((alignment[others] > alignment[gainer]).sum()),
            "alignment_correlation": rank_correlation(alignment, change) if step else 0.0,
            "yes_probability": float(np.exp(logps[ids["yes"]])),
        }

    yield describe(0, reference)
    rows = [{"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}]
    for step, policy, _ in train_by_steps(
        example.model,
        rows,
        output,
        beta=BETA,
        batch_size=1,
        micro_batch_size=1,
        max_steps=STEPS,
        learning_rate=RATE,
        optim="rmsprop",
        seed=seed,
    ):
        if step % EVERY == 0:
            yield describe(step, next_token_logps(policy, start)[0])


def run(scale: Scale) -> Iterator[Row]:
    """Yield the rows of every pair, for one prompt with `quick` and two prompts without."""
    for seed in scale.seeds:
        model = make_model(scale.folder, seed)
        base = load_policy(None, model=str(model)).model
        head = np.array(base.lm_head.weight, np.float64)
        for prompt in PROMPTS[: 1 if scale.quick else 2]:
            for chosen, rejected in pairs():
                example = Example(model, head, prompt, chosen, rejected)
                output = scale.folder / f"words-{seed}-{prompt}-{chosen}-{rejected}"
                for row in measure(example, output, seed=seed):
                    yield {"seed": seed, "part": "one token", **row}
