"""Tokenized pairs -> padded arrays, and the order in which they come. Knows no models.

Order is a function of seed and step, not a state: a resumed run needs nothing saved.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dpo.types import PairBatch, TokenizedPair


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps in which every one of `count` pairs is used once; the last may be smaller."""
    return -(-count // batch_size)


def step_indices(step: int, *, count: int, batch_size: int, seed: int) -> list[int]:
    """Which pairs make up step `step`, counted from 0. At most `batch_size` of them.

    Every epoch is a permutation of its own; its last step holds what remains.
    """
    epoch, position = divmod(step, steps_per_epoch(count, batch_size))
    # NumPy takes no negative seeds; modulo 2^64 keeps every other one as it is.
    order = np.random.default_rng([seed % 2**64, epoch]).permutation(count)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def micro_batches(indices: Sequence[int], lengths: Sequence[int], *, size: int) -> list[list[int]]:
    """`indices` in groups of at most `size`, shorter pairs first, so that like pads like.

    `lengths[i]` is the length of the pair `indices[i]`; ties keep their order.
    """
    by_length = sorted(zip(lengths, indices, strict=True), key=lambda pair: pair[0])
    order = [index for _, index in by_length]
    return [order[start : start + size] for start in range(0, len(order), size)]


def collate(pairs: Sequence[TokenizedPair], *, pad_multiple: int = 8) -> PairBatch:
    """Rows of one width, padded on the right: every chosen one, then every rejected. (N, T)

    The width is rounded up to `pad_multiple`, so that compiled steps see few shapes.
    """
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    longest = max(len(pair) for pair in pairs)
    width = -(-longest // pad_multiple) * pad_multiple

    # What stands in the padding does not matter: it comes after all that is scored.
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.bool_)
    for row, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        tokens[row, :end] = prompt + completion
        mask[row, start:end] = True
    return PairBatch(mx.array(tokens), mx.array(mask))
