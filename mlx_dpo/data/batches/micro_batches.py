"""Micro-batches: the pairs of a step, divided into forward passes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.data.batches.padding import padded_width
from mlx_dpo.data.batches.token_counts import (
    CountTokens,
    DistinctPrefixes,
    TokenCount,
    packed_row_tokens,
    shares_prefixes,
)
from mlx_dpo.data.columns import lengths_only
from mlx_dpo.types import TokenizedPair


def micro_batches(
    indices: Iterable[int], pairs: Sequence[TokenizedPair], limit: PassLimit, *, cost: CountTokens
) -> list[list[int]]:
    """Split the pairs of a step into micro-batches as large as `limit` allows.

    The result has one list of pair indices for each micro-batch. Pairs are sorted by length to
    reduce padding; pairs of equal length keep their order. For a pass that runs what its texts
    begin with only once, they are sorted by their tokens instead: pairs with common beginnings
    meet in a pass.

    Args:
        indices: indices of the pairs of the step.
        pairs: all pairs.
        limit: maximum number of pairs and tokens per forward pass.
        cost: counts the tokens of a forward pass.
    """
    if shares_prefixes(cost):
        return _micro_batches_by_tokens({i: pairs[i] for i in indices}, limit)
    batches: list[list[int]] = []
    lengths = lengths_only(pairs)
    for index in sorted(indices, key=lambda i: len(lengths[i])):
        extended = [*batches[-1], index] if batches else []
        if extended and _fits(extended, lengths, limit, cost):
            batches[-1] = extended
        else:
            batches.append([index])
    return batches


def _micro_batches_by_tokens(pairs: dict[int, TokenizedPair], limit: PassLimit) -> list[list[int]]:
    """Split pairs, given by index, into micro-batches in the order of their tokens."""
    batches: list[list[int]] = []
    prefixes = DistinctPrefixes()

    def order(index: int) -> tuple[tuple[int, ...], ...]:
        return pairs[index].prompt, pairs[index].chosen, pairs[index].rejected

    for index in sorted(pairs, key=order):
        if batches and (limit.pairs is None or len(batches[-1]) < limit.pairs):
            prefixes.add(pairs[index])
            if limit.tokens is None or padded_width(prefixes.count) <= limit.tokens:
                batches[-1].append(index)
                continue
        batches.append([index])
        prefixes = DistinctPrefixes()
        prefixes.add(pairs[index])
    return batches


def largest_micro_batch(
    pairs: Iterable[TokenizedPair], limit: PassLimit, *, cost: CountTokens
) -> list[TokenizedPair]:
    """Return a micro-batch of the longest pair and the longest other pairs that still fit.

    No micro-batch needs more memory. If passes run shared prefixes only once, the pairs are changed
    to share none, and one is cut to fill up a limit of tokens, because other pairs may share less.
    """
    if shares_prefixes(cost):
        most = sorted(pairs, key=lambda pair: packed_row_tokens([pair]).total, reverse=True)
        return _largest_without_shared_prefixes(most, limit)
    batch: list[TokenizedPair] = []
    for pair in sorted(pairs, key=len, reverse=True):
        extended = [*batch, pair]
        if not batch or _fits(range(len(extended)), extended, limit, cost):
            batch = extended
    return batch


FEW_TOKENS = 256  # token ids that every vocabulary has


def _largest_without_shared_prefixes(
    pairs: Sequence[TokenizedPair], limit: PassLimit
) -> list[TokenizedPair]:
    """Return the first of the `pairs` that fit, without any prefix that two texts share."""
    batch: list[TokenizedPair] = []
    for number, pair in enumerate(pairs[: limit.pairs]):
        apart = _without_shared_prefix(pair, first=number)
        used = packed_row_tokens(batch).total if batch else 0
        rest = None if limit.tokens is None or not batch else limit.tokens - used
        if rest is not None and rest < packed_row_tokens([apart]).total:
            return [*batch, _cut(apart, rest)] if rest > 0 else batch
        batch.append(apart)
    return batch


def _without_shared_prefix(pair: TokenizedPair, *, first: int) -> TokenizedPair:
    """Return the pair with other first tokens of the prompt, by `first`, and of `rejected`."""
    rejected = (int(pair.chosen[0] == 0), *pair.rejected[1:]) if pair.rejected else ()
    begin = (first % FEW_TOKENS, first // FEW_TOKENS)[: len(pair.prompt)]
    return replace(pair, prompt=begin + pair.prompt[2:], rejected=rejected)


def _cut(pair: TokenizedPair, tokens: int) -> TokenizedPair:
    """Return the pair, which has more input tokens, cut to exactly so many `tokens`.

    The prompt keeps at least one token; the last token of a completion is no input.
    """
    left, chosen, rejected = tokens - 1, len(pair.chosen) - 1, max(0, len(pair.rejected) - 1)
    chosen = min(chosen, max(left // 2, left - rejected))
    rejected = min(rejected, left - chosen)
    cut = pair.cut_completions(chosen + 1, rejected + 1)
    return replace(cut, prompt=pair.prompt[: tokens - chosen - rejected])


COUNTED_PAIRS = 2048  # of an epoch's order, if the count needs their tokens


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
    """Count the steps, micro-batches and tokens of the first epoch.

    Tokens are read only if passes run shared prefixes once. Then the first `COUNTED_PAIRS` pairs of
    the epoch are counted, and the numbers of a larger set are those times its size.
    """
    lengths = pairs if shares_prefixes(cost) else lengths_only(pairs)
    steps = order.epoch_steps(0)
    counted = first_steps(steps, COUNTED_PAIRS) if shares_prefixes(cost) else steps
    batches = [b for step in counted for b in micro_batches(step, lengths, limit, cost=cost)]
    counts = [cost([lengths[i] for i in batch]) for batch in batches]
    scale = len(pairs) / sum(map(len, counted))
    tokens = TokenCount(
        round(scale * sum(c.total for c in counts)), round(scale * sum(c.padding for c in counts))
    )
    passes = round(scale * len(batches))
    if limit.pairs is not None and limit.tokens is None:
        passes = sum(-(-len(step) // limit.pairs) for step in steps)
    above = _above_limit(pairs, limit, cost)
    return EpochMicroBatches(len(steps), passes, tokens, len(above), max(above, default=0))


def first_steps(steps: Sequence[Sequence[int]], pairs: int) -> Sequence[Sequence[int]]:
    """Return the first steps that have at least so many `pairs`, or all."""
    seen = 0
    for number, step in enumerate(steps, start=1):
        seen += len(step)
        if seen >= pairs:
            return steps[:number]
    return steps


def _above_limit(pairs: Sequence[TokenizedPair], limit: PassLimit, cost: CountTokens) -> list[int]:
    """Return the tokens of each pair that exceeds the limit of tokens by itself."""
    if limit.tokens is None:
        return []
    lengths, exact = lengths_only(pairs), shares_prefixes(cost)
    above = []
    for index, pair in enumerate(lengths):
        total = (packed_row_tokens if exact else cost)([pair]).total
        if total > limit.tokens:
            above.append(cost([pairs[index]]).total if exact else total)
    return [total for total in above if total > limit.tokens]


def _fits(
    indices: Sequence[int], pairs: Sequence[TokenizedPair], limit: PassLimit, cost: CountTokens
) -> bool:
    if limit.pairs is not None and len(indices) > limit.pairs:
        return False
    return limit.tokens is None or cost([pairs[i] for i in indices]).total <= limit.tokens
