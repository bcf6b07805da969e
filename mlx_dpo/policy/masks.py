"""What hides keys from queries, as numbers to be added to their scores."""

import mlx.core as mx


def causal(length: int, seen: int, dtype: mx.Dtype) -> mx.array:
    """To be added to scores; only the last corner hides anything. (C, S)"""
    corner = mx.triu(mx.full((length, length), -mx.inf, dtype), k=1)
    return mx.pad(corner, [(0, 0), (seen - length, 0)])


def added(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """A mask as something to add to scores. Shape of the mask"""
    if mask.dtype != mx.bool_:
        return mask
    # A product, because `where` is slow on the CPU. Half of the lowest number, so that a score
    # added to it does not overflow, and a row that sees nothing stays finite.
    return (1 - mask.astype(dtype)) * (mx.finfo(dtype).min / 2)
