"""A toy world of film reviews: prompts, answers of up to three words, and their true reward.

The base model writes reviews of mixed sentiment. The reward is the sentiment, read from a lexicon
with negation and intensifiers; it plays the part of the classifier of the DPO paper's experiment
with IMDb reviews.
"""

from itertools import product
from pathlib import Path

import numpy as np

from scripts.studies.toy.base import make_base
from scripts.studies.toy.bradley_terry import preference
from scripts.studies.toy.exact import OTHER, AnswerSpace
from scripts.studies.toy.words import Words

SUBJECTS = ("film", "plot", "cast", "music")
ADJECTIVES = {"great": 2.0, "good": 1.0, "fine": 0.5, "dull": -0.5, "bad": -1.0, "awful": -2.0}
WORDS = (*ADJECTIVES, "very", "not", "and", "but")
ASK_PRAISE = "praise"  # a system message that asks for praise
VOCABULARY = Words((*SUBJECTS, *WORDS, ASK_PRAISE))
SPACE = AnswerSpace(VOCABULARY, WORDS, longest=3)
LOWEST, HIGHEST = -3.0, 3.0  # rewards; what is no review has the lowest one
PRAISE = 0.7  # the base writes as if rewards were this much higher, if it is asked for praise


def reward(answer: str) -> float:
    """Return the true reward of an answer, from -3 to 3.

    Adjectives joined by `and` or `but` are averaged; `very` makes an adjective 1.5 times as
    strong, `not` turns it round at 0.7 of its strength. `very very great` is not better than
    `very great`, the best review. Any other order of words is no review.
    """
    words, values = answer.split(), []
    while words:
        value = 1.0
        while words and words[0] in ("very", "not"):
            value *= 1.5 if words.pop(0) == "very" else -0.7
        if not words or words[0] not in ADJECTIVES:
            return LOWEST
        values.append(value * ADJECTIVES[words.pop(0)])
        if words and (words.pop(0) not in ("and", "but") or not words):
            return LOWEST
    return float(np.clip(np.mean(values), LOWEST, HIGHEST)) if values else LOWEST


REWARDS = np.array([reward(answer) for answer in SPACE.answers if answer != OTHER] + [LOWEST])


def human_reviews() -> dict[str, dict[str, float]]:
    """Return the probability of each review that people write, by subject.

    Short reviews are more frequent, and each subject has adjectives of its own.
    """
    draw = np.random.default_rng(0)
    reviews = {}
    for subject in SUBJECTS:
        liked = dict(zip(ADJECTIVES, draw.dirichlet(np.full(len(ADJECTIVES), 2.0)), strict=True))
        weights: dict[str, float] = {}
        for adjective, weight in liked.items():
            weights[adjective] = 0.5 * weight
            weights[f"very {adjective}"] = 0.15 * weight
            weights[f"not {adjective}"] = 0.1 * weight
            weights[f"not very {adjective}"] = 0.05 * weight
        for first, second in product(ADJECTIVES, repeat=2):
            agree = ADJECTIVES[first] * ADJECTIVES[second] > 0
            if first != second:
                joined = f"{first} {'and' if agree else 'but'} {second}"
                weights[joined] = 0.5 * liked[first] * liked[second]
        total = sum(weights.values())
        reviews[subject] = {answer: weight / total for answer, weight in weights.items()}
    return reviews


def sample_pairs(logps: np.ndarray, count: int, draw: np.random.Generator) -> list[dict[str, str]]:
    """Return pairs of different answers of a policy, with sampled Bradley-Terry labels.

    p(w is preferred to l) = sigmoid(r(w) - r(l)); the subjects take turns.

    Args:
        logps: log π(y|x) of every answer in `SPACE` to every subject. (subjects, answers)
    """
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        subject = len(rows) % len(SUBJECTS)
        weights = np.exp(logps[subject, :-1])
        first, second = draw.choice(len(weights), size=2, p=weights / weights.sum())
        if first == second:
            continue
        if draw.random() > preference(REWARDS[first] - REWARDS[second]):
            first, second = second, first
        answers = {"chosen": SPACE.answers[first], "rejected": SPACE.answers[second]}
        rows.append({"prompt": SUBJECTS[subject], **answers})
    return rows


def make_reviewer(folder: Path, *, seed: int, steps: int = 500) -> Path:
    """Write the base model, which reviews as people do; return `folder`.

    After the system message `praise` it writes better reviews, as a chat model would.
    """
    reviews = human_reviews()
    praise = []
    for subject, choices in reviews.items():
        weights = {answer: p * np.exp(PRAISE * reward(answer)) for answer, p in choices.items()}
        total = sum(weights.values())
        praise.append((ASK_PRAISE, subject, {a: float(w / total) for a, w in weights.items()}))
    return make_base(
        folder,
        VOCABULARY,
        reviews,
        seed=seed,
        steps=steps,
        batch_size=72,
        system=praise,
    )
