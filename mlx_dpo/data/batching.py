"""Batches of tokenized pairs: shuffling, micro-batches, padding and collation.

The order of the pairs depends only on seed and step, so no shuffling state is saved for resuming.
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

PAD_MULTIPLE = 8  # the width of padded rows is a multiple of it
# Width of the continuations of a shared prompt, unless they are empty; see `scoring.shared_prefix`.
MIN_CONTINUATION = 2


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return the number of optimizer steps in one epoch of `count` pairs.

    The last step may have fewer than `batch_size` pairs.
    """
    return -(-count // batch_size)


def step_indices(step: int, *, count: int, batch_size: int, seed: int) -> list[int]:
    """Return the indices of the pairs of one optimizer step, at most `batch_size`.

    The pairs are shuffled again for each epoch. Its last step has the remaining pairs.

    Args:
        step: number of the step in the whole run, from 0.
        count: number of training pairs.
        batch_size: pairs per optimizer step.
        seed: seed of the shuffling.
    """
    epoch, position = divmod(step, steps_per_epoch(count, batch_size))
    start = position * batch_size
    indices: list[int] = _order(epoch, count, seed)[start : start + batch_size].tolist()
    return indices


def indices_of_steps(steps: int, *, count: int, batch_size: int, seed: int) -> list[int]:
    """Return the indices of the pairs that the first `steps` optimizer steps of a run see.

    The pairs of less than an epoch are in the order of the steps. From one epoch on all pairs are
    seen, and their order is that of the data set.
    """
    if steps >= steps_per_epoch(count, batch_size):
        return list(range(count))
    indices: list[int] = _order(0, count, seed)[: steps * batch_size].tolist()
    return indices


def epoch_step_indices(epoch: int, *, count: int, batch_size: int, seed: int) -> list[list[int]]:
    """Return one list of pair indices for each optimizer step of epoch `epoch` (from 0)."""
    order = _order(epoch, count, seed).tolist()
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


@lru_cache(maxsize=1)  # the steps of an epoch use the same permutation
def _order(epoch: int, count: int, seed: int) -> np.ndarray:
    # NumPy takes no negative seeds; modulo 2^64 leaves the others unchanged.
    order = np.random.default_rng([seed % 2**64, epoch]).permutation(count)
    order.flags.writeable = False
    return order


class TokenCount(NamedTuple):
    """Number of tokens that the model processes in a forward pass, and the padding in it."""

    total: int  # including padding
    padding: int


# Counts the tokens of one forward pass over the pairs; the setting `scorer` decides which function.
CountTokens = Callable[[Sequence[TokenizedPair]], TokenCount]


def padded_row_tokens(pairs: Sequence[TokenizedPair]) -> TokenCount:
    """Count the input tokens of a forward pass with two padded sequences per pair.

    A sequence is a prompt and one completion, without the last token, which predicts nothing.
    This is the layout of the setting `scorer: plain`.
    """
    total = 2 * len(pairs) * (_row_width(pairs, PAD_MULTIPLE) - 1)
    return TokenCount(
        total, total - sum(2 * len(p.prompt) + _continuation_tokens(p) for p in pairs)
    )


def packed_row_tokens(pairs: Sequence[TokenizedPair]) -> TokenCount:
    """Count the input tokens of a forward pass with all pairs packed into one sequence.

    Each prompt is followed by both of its completions, and is therefore counted once.
    """
    tokens = sum(len(p.prompt) + _continuation_tokens(p) for p in pairs)
    return TokenCount(padded_width(tokens), padded_width(tokens) - tokens)


def shared_prompt_tokens(pairs: Sequence[TokenizedPair], *, together: bool) -> TokenCount:
    """Count the input tokens of a forward pass that processes each prompt only once.

    The last token of a completion is not an input. Pairs with prompts of equal length form a
    batch; with `together`, all pairs form one batch.
    """
    batches: dict[int, list[TokenizedPair]] = {}
    for pair in pairs:
        batches.setdefault(0 if together else len(pair.prompt), []).append(pair)
    total = sum(len(batch) * _shared_width(batch) for batch in batches.values())
    return TokenCount(total, total - sum(len(p.prompt) + _continuation_tokens(p) for p in pairs))


def _continuation_tokens(pair: TokenizedPair) -> int:
    """Return the number of tokens of both completions, without the last token of each."""
    return len(pair.chosen) - 1 + len(pair.rejected) - 1


def _shared_width(pairs: Sequence[TokenizedPair]) -> int:
    """Return the number of tokens, with padding, of each pair's prompt and two completions."""
    prompts = {len(pair.prompt) for pair in pairs}
    is_padded = len(prompts) > 1
    width = padded_width(max(prompts)) if is_padded else max(prompts)
    for longest in (max(len(p.chosen) for p in pairs), max(len(p.rejected) for p in pairs)):
        if longest > 1:
            needed = max(longest - 1, MIN_CONTINUATION)
            width += padded_width(needed) if is_padded else needed
    return width


def padded_width(length: int) -> int:
    """Return the number of tokens to which sequences of up to `length` tokens are padded.

    On a GPU this is one of a few widths, because each width needs its own buffers and compiled
    kernels: at most length / 8 + 7 positions are padding, and there are fewer than 70 widths up
    to 16,384. On the CPU this is `length`.
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
    batch_size: int,
    seed: int,
    cost: CountTokens,
) -> EpochMicroBatches:
    """Count the steps, micro-batches and tokens of the first epoch, without reading tokens."""
    lengths = lengths_only(pairs)
    steps = epoch_step_indices(0, count=len(pairs), batch_size=batch_size, seed=seed)
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


def collate(pairs: Sequence[TokenizedPair], *, pad_multiple: int = PAD_MULTIPLE) -> PairBatch:
    """Collate pairs into a right-padded batch: all chosen, then all rejected sequences. (2B, T)

    A sequence is a prompt and one completion. The width T is `padded_width` of the longest
    sequence, rounded up to a multiple of `pad_multiple`.
    """
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = _row_width(pairs, pad_multiple)

    # The padding token does not matter: it comes after all scored tokens.
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.bool_)
    for row, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        tokens[row, :end] = prompt + completion
        mask[row, start:end] = True
    return PairBatch(mx.array(tokens), mx.array(mask))


def pair_metadata(pairs: Sequence[TokenizedPair]) -> PairMetadata:
    """Return completion lengths, target margins, weights and labels as arrays. (B,) each

    `pairs` must be all pairs of an optimizer step or of an evaluation, because the result also
    has the mean length of their chosen completions.
    """
    lengths, margins_and_weights = (
        column(pairs, name).astype(np.float32) for name in (LENGTHS, MARGINS_AND_WEIGHTS)
    )
    chosen = mx.array(lengths[:, 1])
    return PairMetadata(
        chosen_tokens=chosen,
        rejected_tokens=mx.array(lengths[:, 2]),
        mean_chosen_tokens=chosen.mean(),
        margins=mx.array(margins_and_weights[:, 0]),
        weights=mx.array(margins_and_weights[:, 1]),
        desirable=mx.array(column(pairs, LABELS) != 0),
    )


def select_metadata(metadata: PairMetadata, indices: mx.array) -> PairMetadata:
    """Return the metadata of the pairs at `indices`, arrays of shape (b,).

    Only the mean length of chosen completions stays that of all pairs.
    """
    selected = {
        name: value if value.ndim == 0 else value[indices]
        for name, value in metadata._asdict().items()
    }
    return PairMetadata(**selected)
