"""Rank pairs by similarity, train on the least and on the most similar ones, and compare.

Answers are sentences whose words have synonyms. A rejected answer is another sentence, or the
chosen one with synonyms, so that an edit distance cannot tell which pairs are similar.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_dpo import load_policy
from scripts.studies.baselines.ches import ches, edit_distance, hidden_embeddings, last_similarity
from scripts.studies.reporting.study import Row, Scale
from scripts.studies.toy.base import tune_base
from scripts.studies.toy.exact import answer_logps
from scripts.studies.toy.similar_words import (
    EMBEDDINGS,
    HEAD,
    HEAD_LENGTH,
    set_word_rows,
    similar_vectors,
)
from scripts.studies.toy.train import train
from scripts.studies.toy.words import Words, write_checkpoint

MEANINGS, SYNONYMS, SPREAD = 6, 3, 0.25
WORDS = tuple(f"{meaning}{index}" for meaning in "abcdef" for index in range(SYNONYMS))
PROMPTS = ("north", "south", "east", "west")
VOCABULARY = Words((*PROMPTS, *WORDS))
LENGTHS = (3, 7)  # words of a sentence, the upper end excluded
CONCENTRATION = 0.5  # of the meanings that follow one
PAIRS, PART = 120, 24  # PART pairs are a fifth
REPLACED = (None, 1.0, 0.4)  # share of words replaced by synonyms; None: another sentence
DIMENSIONS, BETA, RATE, STEPS = 48, 0.1, 2e-4, 20
LEAST, MOST = "least similar", "most similar"
CHES, NORMALIZED, EDITS = "CHES", "CHES, normalised", "edit distance"
LAST, LENGTH = "last state", "length"
# Each remedy changes these settings of DPO.
REMEDIES = {
    "DPO": {},
    "DPO + SFT": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 1]},
    "DPOP": {"loss_type": "dpop"},
    "DPO, a tenth of the rate": {"learning_rate": RATE / 10},
}


class Pair(NamedTuple):
    """A prompt with its answers."""

    prompt: str
    chosen: str
    rejected: str


class Sentences:
    """Draws sentences: a chain of meanings, each said by one of its synonyms."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng([seed, 3])
        self.first = self.draw.dirichlet(np.full(MEANINGS, CONCENTRATION), len(PROMPTS))
        self.followers = self.draw.dirichlet(np.full(MEANINGS, CONCENTRATION), MEANINGS)

    def sentence(self, prompt: str) -> str:
        """Return a sentence."""
        chances, words = self.first[PROMPTS.index(prompt)], []
        for _ in range(self.draw.integers(*LENGTHS)):
            meaning = int(self.draw.choice(MEANINGS, p=chances))
            words.append(WORDS[meaning * SYNONYMS + int(self.draw.integers(SYNONYMS))])
            chances = self.followers[meaning]
        return " ".join(words)

    def reworded(self, sentence: str, share: float) -> str:
        """Return a sentence in which each word is replaced by a synonym with this probability."""
        words = []
        for word in sentence.split():
            meaning, index = divmod(WORDS.index(word), SYNONYMS)
            shift = int(self.draw.integers(1, SYNONYMS)) if self.draw.random() < share else 0
            words.append(WORDS[meaning * SYNONYMS + (index + shift) % SYNONYMS])
        return " ".join(words)

    def pairs(self) -> Iterator[Pair]:
        """Yield pairs: a third are unrelated sentences, the others reworded."""
        count = 0
        while count < PAIRS:
            prompt = PROMPTS[count % len(PROMPTS)]
            chosen, share = self.sentence(prompt), REPLACED[count // len(PROMPTS) % len(REPLACED)]
            rejected = self.sentence(prompt) if share is None else self.reworded(chosen, share)
            if rejected != chosen:
                yield Pair(prompt, chosen, rejected)
                count += 1


def make_model(folder: Path, sentences: Sentences, seed: int) -> Path:
    """Write a base model that gives such sentences."""
    random = write_checkpoint(
        folder / f"sentences-{seed}-random", VOCABULARY, seed=seed, hidden=DIMENSIONS
    )
    for tensor, length in ((HEAD, HEAD_LENGTH), (EMBEDDINGS, 1.0)):
        vectors = [
            vector
            for _ in range(MEANINGS)
            for vector in similar_vectors(sentences.draw, [SPREAD] * SYNONYMS, DIMENSIONS)
        ]
        rows = {word: length * vector for word, vector in zip(WORDS, vectors, strict=True)}
        set_word_rows(random, VOCABULARY, tensor, rows)
    rows = [
        {"prompt": prompt, "completion": sentences.sentence(prompt), "probability": 1}
        for prompt in PROMPTS
        for _ in range(64)
    ]
    output = folder / f"sentences-{seed}"
    return tune_base(output, random, rows, seed=seed, steps=150, batch_size=64)


def similarities(base: object, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Return the similarity of each pair by each measure; larger is more similar. (PAIRS,)"""
    values: dict[str, list[float]] = {name: [] for name in (CHES, NORMALIZED, EDITS, LAST, LENGTH)}
    for prompt, chosen, rejected in pairs:
        states = [hidden_embeddings(base, VOCABULARY, prompt, y) for y in (chosen, rejected)]
        values[CHES].append(ches(*states))
        values[NORMALIZED].append(ches(*states, normalized=True))
        values[LENGTH].append(len(states[1]) - len(states[0]))
        values[EDITS].append(-edit_distance(chosen, rejected))
        values[LAST].append(last_similarity(*states))
    return {name: np.array(each) for name, each in values.items()}


def run(scale: Scale) -> Iterator[Row]:
    """Train on the fifths of least and most similar pairs; yield a row per run."""
    for seed in scale.seeds:
        sentences = Sentences(seed)
        model = make_model(scale.folder, sentences, seed)
        base = load_policy(None, model=str(model)).model
        pairs = list(sentences.pairs())
        before = _pair_logps(base, pairs)
        measured = similarities(base, pairs)
        for measure, values in measured.items():
            order = np.argsort(values, kind="stable")
            for part, chosen in ((LEAST, order[:PART]), (MOST, order[-PART:])):
                remedies = list(REMEDIES) if (measure, part) == (CHES, MOST) else ["DPO"]
                for remedy in remedies:
                    output = scale.folder / f"sentences-{seed}-{measure}-{part}-{remedy}"
                    policy = train(
                        model,
                        [pairs[index]._asdict() for index in chosen],
                        output,
                        **{"beta": BETA, "learning_rate": RATE} | REMEDIES[remedy],
                        batch_size=PART,
                        micro_batch_size=PART,
                        max_steps=STEPS,
                        seed=seed,
                    )
                    change = _pair_logps(policy, [pairs[index] for index in chosen])
                    change -= before[chosen]
                    yield {
                        "seed": seed,
                        "measure": measure,
                        "fifth": part,
                        "remedy": remedy,
                        "similarity": float(values[chosen].mean()),
                        "chosen_change": float(change[:, 0].mean()),
                        "margin": float((change[:, 0] - change[:, 1]).mean()),
                        "warned": int(is_warned(output)),
                    }


def _pair_logps(model: object, pairs: Sequence[Pair]) -> np.ndarray:
    """Return log π of the answers of each pair. (pairs, 2)"""
    return np.array([answer_logps(model, VOCABULARY, pair.prompt, pair[1:]) for pair in pairs])


def is_warned(run: Path) -> bool:
    """Return whether the monitor of a run warned that chosen answers become less likely.

    That is its warning of likelihood displacement, or one of those that replace it because they
    are graver: the policy is far from the reference, or has diverged.
    """
    warnings = json.loads((run / "run.json").read_text(encoding="utf-8"))["warnings"]
    return any(
        "chosen completions" in text and ("lose likelihood" in text or "less likely" in text)
        for text in warnings
    )
