"""The order of the pairs: which pairs each optimizer step sees.

The order depends only on seed and step, so no shuffling state is saved for resuming.
"""

from functools import lru_cache

import numpy as np


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
