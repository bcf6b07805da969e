"""Measure how much a generated text repeats itself."""

from collections.abc import Sequence

NGRAM = 4


def repetition_rate(tokens: Sequence[int]) -> float:
    """Return the share of the 4-grams of `tokens` that repeat an earlier 4-gram.

    Source: Welleck et al. 2019, arXiv:1908.04319, section 6.1, seq-rep-4.
    """
    ngrams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
