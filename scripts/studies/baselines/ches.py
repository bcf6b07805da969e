"""Centered hidden embedding similarity (CHES): how much a pair risks likelihood displacement.

Source: Razin et al. 2024, arXiv:2410.08847, Definition 2 and Section 6 (normalized by length).
"""

from typing import Any

import mlx.core as mx
import numpy as np

from scripts.studies.toy.words import Words


def hidden_embeddings(model: Any, vocabulary: Words, prompt: str, answer: str) -> np.ndarray:
    """Return the inputs of the LM head that predict the answer's tokens. (tokens, dimensions)

    The first row is that of the prompt's last token; the last row predicts the end.
    """
    start, ids = vocabulary.prompt_ids(prompt), vocabulary.answer_ids(answer)
    states = model.model(mx.array([start + ids[:-1]]))[0, len(start) - 1 :]
    return np.array(states.astype(mx.float32), np.float64)


def ches(chosen: np.ndarray, rejected: np.ndarray, *, normalized: bool = False) -> float:
    """Return ⟨s⁺, s⁻⟩ - ‖s⁺‖², where s is the sum of an answer's hidden embeddings.

    Args:
        chosen: hidden embeddings of the chosen answer. (tokens, dimensions)
        rejected: those of the rejected answer. (tokens, dimensions)
        normalized: take means over tokens instead of sums.
    """
    pool = np.mean if normalized else np.sum
    preferred, other = pool(chosen, axis=0), pool(rejected, axis=0)
    return float(preferred @ other - preferred @ preferred)


def last_similarity(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """Return the inner product of the last hidden embeddings, a measure CHES is compared with."""
    return float(chosen[-1] @ rejected[-1])


def edit_distance(chosen: str, rejected: str) -> float:
    """Return the Levenshtein distance in words, divided by the length of the longer answer."""
    one, other = chosen.split(), rejected.split()
    costs = list(range(len(other) + 1))
    for row, word in enumerate(one, 1):
        diagonal, costs[0] = costs[0], row
        for column, compared in enumerate(other, 1):
            change = diagonal + (word != compared)
            diagonal = costs[column]
            costs[column] = min(change, costs[column] + 1, costs[column - 1] + 1)
    return costs[-1] / max(len(one), len(other))
