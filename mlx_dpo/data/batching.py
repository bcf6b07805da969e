"""Tokenized pairs -> padded arrays, and the order and the passes in which they come.

Knows no models. Order is a function of seed and step, not a state: a resumed run needs
nothing saved.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.columns import (
    LABELS,
    LENGTHS,
    MARGINS_AND_WEIGHTS,
    column,
    lengths_only,
)
from mlx_dpo.types import PairBatch, PairMetadata, TokenizedPair

PAD_MULTIPLE = 8  # of the widths of whole rows
MIN_CONTINUATION = 2  # tokens after a shared prompt, if there are any; see policy.prefix


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps in which every one of `count` pairs is used once; the last may be smaller."""
    return -(-count // batch_size)


def step_indices(step: int, *, count: int, batch_size: int, seed: int) -> list[int]:
    """Which pairs make up step `step`, counted from 0. At most `batch_size` of them.

    Every epoch is a permutation of its own; its last step holds what remains.
    """
    epoch, position = divmod(step, steps_per_epoch(count, batch_size))
    start = position * batch_size
    picked: list[int] = _order(epoch, count, seed)[start : start + batch_size].tolist()
    return picked


def epoch_step_indices(epoch: int, *, count: int, batch_size: int, seed: int) -> list[list[int]]:
    """Which pairs make up each step of an epoch, counted from 0."""
    order = _order(epoch, count, seed).tolist()
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


@lru_cache(maxsize=1)  # every step of an epoch asks for it
def _order(epoch: int, count: int, seed: int) -> np.ndarray:
    # NumPy takes no negative seeds; modulo 2^64 keeps every other one as it is.
    order = np.random.default_rng([seed % 2**64, epoch]).permutation(count)
    order.flags.writeable = False
    return order


class TokenCount(NamedTuple):
    """Tokens that go through the layers of a model."""

    total: int  # with padding
    padding: int


CountTokens = Callable[[Sequence[TokenizedPair]], TokenCount]  # of one pass over these pairs


def padded_row_tokens(pairs: Sequence[TokenizedPair]) -> TokenCount:
    """What the plain scorer costs: two padded rows a pair, but for the last token of each."""
    total = 2 * len(pairs) * (_row_width(pairs, PAD_MULTIPLE) - 1)
    return TokenCount(
        total, total - sum(2 * len(p.prompt) + _continuation_tokens(p) for p in pairs)
    )


def packed_row_tokens(pairs: Sequence[TokenizedPair]) -> TokenCount:
    """What the shared scorer costs where all pairs lie in one row, one behind the other."""
    tokens = sum(len(p.prompt) + _continuation_tokens(p) for p in pairs)
    return TokenCount(padded_width(tokens), padded_width(tokens) - tokens)


def shared_prompt_tokens(pairs: Sequence[TokenizedPair], *, together: bool) -> TokenCount:
    """What it costs where prompts are forked: they once, completions but for their last token.

    Pairs whose prompts are equally long are one batch; all are with `together`.
    """
    batches: dict[int, list[TokenizedPair]] = {}
    for pair in pairs:
        batches.setdefault(0 if together else len(pair.prompt), []).append(pair)
    total = sum(len(batch) * _shared_width(batch) for batch in batches.values())
    return TokenCount(total, total - sum(len(p.prompt) + _continuation_tokens(p) for p in pairs))


def _continuation_tokens(pair: TokenizedPair) -> int:
    return len(pair.chosen) - 1 + len(pair.rejected) - 1


def _shared_width(pairs: Sequence[TokenizedPair]) -> int:
    """Positions of a padded prompt and its two padded continuations."""
    prompts = {len(pair.prompt) for pair in pairs}
    uneven = len(prompts) > 1
    width = padded_width(max(prompts)) if uneven else max(prompts)
    for longest in (max(len(p.chosen) for p in pairs), max(len(p.rejected) for p in pairs)):
        if longest > 1:
            needed = max(longest - 1, MIN_CONTINUATION)
            width += padded_width(needed) if uneven else needed
    return width


def padded_width(length: int) -> int:
    """The width in which rows of up to `length` tokens are held: on a GPU one of a few.

    There each width costs buffers and kernels of its own. At most length / 8 + 7 positions
    are padding, and up to 16,384 there are fewer than 70 widths.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        return length
    # The largest power of two within length / 8 + 8, so 8 at least.
    return _round_up(length, 1 << (length // 8 + 8).bit_length() - 1)


def _row_width(pairs: Sequence[TokenizedPair], multiple: int) -> int:
    return _round_up(padded_width(max(len(pair) for pair in pairs)), multiple)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def micro_batches(
    indices: Iterable[int], pairs: Sequence[TokenizedPair], limit: PassLimit, *, cost: CountTokens
) -> list[list[int]]:
    """The passes of a step: `indices` into `pairs`, in groups as large as `limit` allows.

    Shorter pairs come first, so that like pads like; ties keep their order.
    """
    groups: list[list[int]] = []
    sizes = lengths_only(pairs)
    for index in sorted(indices, key=lambda i: len(sizes[i])):
        grown = [*groups[-1], index] if groups else []
        if grown and _fits(grown, sizes, limit, cost):
            groups[-1] = grown
        else:
            groups.append([index])
    return groups


def largest_micro_batch(
    pairs: Iterable[TokenizedPair], limit: PassLimit, *, cost: CountTokens
) -> list[TokenizedPair]:
    """The longest pair, with the longest others that may go through beside it."""
    held: list[TokenizedPair] = []
    for pair in sorted(pairs, key=len, reverse=True):
        grown = [*held, pair]
        if not held or _fits(range(len(grown)), grown, limit, cost):
            held = grown
    return held


class EpochMicroBatches(NamedTuple):
    """What the passes of one epoch are going to be."""

    steps: int
    passes: int
    tokens: TokenCount
    alone: int  # pairs that are above the limit of tokens by themselves
    longest: int  # tokens of the longest of these, 0 if there are none


def count_micro_batches(
    pairs: Sequence[TokenizedPair],
    limit: PassLimit,
    *,
    batch_size: int,
    seed: int,
    cost: CountTokens,
) -> EpochMicroBatches:
    """The passes of the first epoch, from lengths alone."""
    sizes = lengths_only(pairs)
    steps = epoch_step_indices(0, count=len(pairs), batch_size=batch_size, seed=seed)
    groups = [g for step in steps for g in micro_batches(step, sizes, limit, cost=cost)]
    costs = [cost([sizes[i] for i in group]) for group in groups]
    # Only a pair that goes alone may be above the limit.
    above = [c.total for c in costs if limit.tokens is not None and c.total > limit.tokens]
    tokens = TokenCount(sum(c.total for c in costs), sum(c.padding for c in costs))
    return EpochMicroBatches(len(steps), len(groups), tokens, len(above), max(above, default=0))


def _fits(
    places: Sequence[int], pairs: Sequence[TokenizedPair], limit: PassLimit, cost: CountTokens
) -> bool:
    few = limit.pairs is None or len(places) <= limit.pairs
    return few and (limit.tokens is None or cost([pairs[i] for i in places]).total <= limit.tokens)


def collate(pairs: Sequence[TokenizedPair], *, pad_multiple: int = PAD_MULTIPLE) -> PairBatch:
    """Rows of one width, padded on the right: every chosen one, then every rejected. (N, T)

    The width is `padded_width` of the longest, rounded up to `pad_multiple`.
    """
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = _row_width(pairs, pad_multiple)

    # What stands in the padding does not matter: it comes after all that is scored.
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.bool_)
    for row, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        tokens[row, :end] = prompt + completion
        mask[row, start:end] = True
    return PairBatch(mx.array(tokens), mx.array(mask))


def pair_metadata(pairs: Sequence[TokenizedPair]) -> PairMetadata:
    """Of the pairs that a loss is a mean of: all of a step, or of an evaluation. (B,) each"""
    lengths, told = (
        column(pairs, name).astype(np.float32) for name in (LENGTHS, MARGINS_AND_WEIGHTS)
    )
    chosen = mx.array(lengths[:, 1])
    return PairMetadata(
        chosen_tokens=chosen,
        rejected_tokens=mx.array(lengths[:, 2]),
        mean_chosen_tokens=chosen.mean(),
        margins=mx.array(told[:, 0]),
        weights=mx.array(told[:, 1]),
        desirable=mx.array(column(pairs, LABELS) != 0),
    )


def select_metadata(facts: PairMetadata, at: mx.array) -> PairMetadata:
    """The facts of the pairs at these places. (b,) each; the mean stays that of all."""
    taken = {
        name: value if value.ndim == 0 else value[at] for name, value in facts._asdict().items()
    }
    return PairMetadata(**taken)
