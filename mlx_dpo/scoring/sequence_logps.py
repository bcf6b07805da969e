"""Compute the log-probs of the last tokens of token sequences, without gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.scoring.logps import token_logps
from mlx_dpo.scoring.scorers import fast_inference

TOKENS_PER_PASS = 2048  # padding included; a longer sequence has a pass of its own


class ScoredSequence(NamedTuple):
    """A token sequence, of which the tokens from index `start` on are scored; `start` is >= 1."""

    tokens: Sequence[int]
    start: int


def sequence_logps(
    model: Any,
    sequences: Sequence[ScoredSequence],
    *,
    progress: Callable[[int], None] = lambda scored: None,
) -> list[float]:
    """Return the summed log-prob of the scored tokens of each sequence, in order, in nats.

    Sequences of similar length are padded on the right, where a causal model cannot see the
    padding. The sums are computed in float64.

    Args:
        progress: called after each pass with the number of sequences in it.
    """
    sums = [0.0] * len(sequences)
    for indices in _passes(sequences):
        rows = [sequences[index] for index in indices]
        width = max(len(row.tokens) for row in rows)
        tokens = np.zeros((len(rows), width), np.int32)
        for row, sequence in zip(tokens, rows, strict=True):
            row[: len(sequence.tokens)] = sequence.tokens
        with fast_inference(model):
            logps = np.array(token_logps(model, mx.array(tokens)), np.float64)
        for index, sequence, values in zip(indices, rows, logps, strict=True):
            sums[index] = float(values[sequence.start - 1 : len(sequence.tokens) - 1].sum())
        progress(len(indices))
    return sums


def _passes(sequences: Sequence[ScoredSequence]) -> Iterator[list[int]]:
    """Yield the indices of the sequences of each pass, the longest first."""
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].tokens))
    group: list[int] = []
    for index in longest_first:
        width = len(sequences[(group or [index])[0]].tokens)
        if group and (len(group) + 1) * width > TOKENS_PER_PASS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
