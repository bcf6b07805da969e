"""Compute the log-probs of the last tokens of token sequences, without gradients.

Sequences are padded and batched; several continuations of one prefix run on its KV cache.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.scoring.kernels.softmax import target_logps
from mlx_dpo.scoring.logps import token_logps
from mlx_dpo.scoring.scorers import fast_inference

TOKENS_PER_PASS = 2048  # padding included; a longer sequence has a pass of its own
PREFIX_STEP = 2048  # tokens of a prefix that go through the model at once


class ScoredSequence(NamedTuple):
    """A token sequence, of which the tokens from index `start` on are scored; `start` is >= 1.

    The tokens in `gaps`, ranges of indices after `start`, are not scored.
    """

    tokens: Sequence[int]
    start: int
    gaps: Sequence[tuple[int, int]] = ()


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
            for start, end in sequence.gaps:
                values[start - 1 : end - 1] = 0.0
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


class ContinuationScore(NamedTuple):
    """The summed log-prob of a continuation, and whether greedy decoding would generate it."""

    logp: float
    is_greedy: bool


def continuation_scores(
    model: Any, prefix: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[ContinuationScore]:
    """Return the scores of several continuations of one prefix, in order.

    The prefix goes through the model once; each continuation starts from a copy of its KV cache.

    Args:
        model: a causal model of mlx-lm.
        prefix: token ids, at least one.
        continuations: token ids of each continuation, at least one each.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for start in range(0, len(prefix) - 1, PREFIX_STEP):
        step = prefix[start : min(start + PREFIX_STEP, len(prefix) - 1)]
        model(mx.array([step]), cache=cache)  # its logits are not needed, so never computed
        mx.eval([layer.state for layer in cache])
    first = model(mx.array([prefix[-1:]]), cache=cache)
    mx.eval(first, [layer.state for layer in cache])
    return [_continuation_score(model, first, cache, tokens) for tokens in continuations]


def _continuation_score(
    model: Any, first: mx.array, cache: Any, tokens: Sequence[int]
) -> ContinuationScore:
    """Return the score of a continuation.

    Args:
        first: logits of the continuation's first token. (1, 1, V)
        cache: KV cache of the prefix, which stays as it is.
    """
    logits = first
    if len(tokens) > 1:
        rest = model(mx.array([tokens[:-1]]), cache=copy.deepcopy(cache))
        logits = mx.concatenate([first, rest], axis=1)
    targets = mx.array([tokens])
    logps = target_logps(logits.astype(mx.float32), targets)
    greedy = mx.all(logits.argmax(axis=-1) == targets)
    return ContinuationScore(float(np.array(logps, np.float64).sum()), bool(greedy.item()))
