"""Micro-batches: the pairs of a step, divided into forward passes."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.data.batches.token_counts import CountTokens, TokenCount
from mlx_dpo.data.columns import lengths_only
from mlx_dpo.types import TokenizedPair


def micro_batches(
    indices: Iterable[int], pairs: Sequence[TokenizedPair], limit: PassLimit, *, cost: CountTokens
) -> list[list[int]]:
    """Split the pairs of a step into micro-batches as large as `limit` allows.

    The result has one list of pair indices for each micro-batch. Pairs are sorted by length to
    reduce padding; pairs of equal length keep their order.

    Args:
        indices: indices of the pairs of the step.
        pairs: all pairs.
        limit: maximum number of pairs and tokens per forward pass.
        cost: counts the tokens of a forward pass.
    """
    batches: list[list[int]] = []
    lengths = lengths_only(pairs)
    for index in sorted(indices, key=lambda i: len(lengths[i])):
        extended = [*batches[-1], index] if batches else []
        if extended and _fits(extended, lengths, limit, cost):
            batches[-1] = extended
        else:
            batches.append([index])
    return batches


def largest_micro_batch(
    pairs: Iterable[TokenizedPair], limit: PassLimit, *, cost: CountTokens
) -> list[TokenizedPair]:
    """Return a micro-batch of the longest pair and the longest other pairs that still fit."""
    batch: list[TokenizedPair] = []
    for pair in sorted(pairs, key=len, reverse=True):
        extended = [*batch, pair]
        if not batch or _fits(range(len(extended)), extended, limit, cost):
            batch = extended
    return batch


class EpochMicroBatches(NamedTuple):
    """Number of steps, micro-batches and tokens of one epoch."""

    steps: int
    micro_batches: int
    tokens: TokenCount
    oversized: int  # pairs that exceed the token limit by themselves
    longest: int  # tokens of the longest oversized pair, 0 if there is none


def count_micro_batches(
    pairs: Sequence[TokenizedPair],
    limit: PassLimit,
    *,
    order: PairOrder,
    cost: CountTokens,
) -> EpochMicroBatches:
    """Count the steps, micro-batches and tokens of the first epoch, without reading tokens."""
    lengths = lengths_only(pairs)
    steps = order.epoch_steps(0)
    batches = [b for step in steps for b in micro_batches(step, lengths, limit, cost=cost)]
    counts = [cost([lengths[i] for i in batch]) for batch in batches]
    # Only a micro-batch of a single pair may exceed the limit.
    above = [c.total for c in counts if limit.tokens is not None and c.total > limit.tokens]
    tokens = TokenCount(sum(c.total for c in counts), sum(c.padding for c in counts))
    return EpochMicroBatches(len(steps), len(batches), tokens, len(above), max(above, default=0))


def _fits(
    indices: Sequence[int], pairs: Sequence[TokenizedPair], limit: PassLimit, cost: CountTokens
) -> bool:
    if limit.pairs is not None and len(indices) > limit.pairs:
        return False
    return limit.tokens is None or cost([pairs[i] for i in indices]).total <= limit.tokens
