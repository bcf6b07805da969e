"""Rows of an array by index, with gradients that have the same bits in each run.

On a GPU, MLX adds the gradients of equal indices with atomic operations, in an order that differs
from run to run (`scatter.h` of its Metal kernels). Two equal indices give the same sum in both
orders. A row that is taken more often, such as the end of a prompt with many completions, would get
another sum in each run, and a resumed run would differ from one that was not interrupted.

Shape letters: m rows, n indices.
"""

import mlx.core as mx
import numpy as np

from mlx_dpo.models.device import is_cpu


def take_rows(x: mx.array, indices: mx.array) -> mx.array:
    """Return `x[indices]`. (m, ...), (n,) -> (n, ...)"""
    if is_cpu():  # adds in order
        return x[indices]
    distinct, at, counts = np.unique(np.array(indices), return_inverse=True, return_counts=True)
    if counts.max(initial=0) <= 2:
        return x[indices]
    # One gather per use, each of distinct rows: MLX adds their gradients one after the other. Uses
    # after the first one gather from the repeated rows only, whose gradients are small arrays.
    at = at.reshape(-1)
    use = _number_uses(at, counts)
    first = x[mx.array(distinct)]
    is_repeated = counts > 1
    repeated = first[mx.array(np.flatnonzero(is_repeated))]
    place = np.cumsum(is_repeated) - 1  # of a distinct row among the repeated ones
    by_use = [np.flatnonzero(use == number) for number in range(1, int(counts.max()))]
    taken = [first, *(repeated[mx.array(place[at[uses]])] for uses in by_use)]
    where = at.copy()  # index of each row of the result in `taken`
    later = np.concatenate(by_use)
    where[later] = len(distinct) + np.arange(len(later))
    return mx.concatenate(taken)[mx.array(where)]


def _number_uses(at: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return how often the row of each index was taken before. (n,)

    Args:
        at: number of each index's row, (n,).
        counts: how often each row is taken, (rows,).
    """
    order = np.argsort(at, kind="stable")
    use = np.empty(len(at), np.int64)
    use[order] = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
    return use
