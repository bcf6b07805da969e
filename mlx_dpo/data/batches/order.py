"""The order of the training pairs: which pairs each optimizer step of a run sees.

The order depends only on seed and step, so no shuffling state is saved for resuming.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np

from mlx_dpo.data.columns import RANKINGS, column, pair_keys, prompt_keys
from mlx_dpo.types import TokenizedPair


@dataclass(frozen=True, kw_only=True, eq=False)
class PairOrder:
    """The order of `count` pairs, which are shuffled again for each epoch.

    A step has `batch_size` pairs, and the last step of an epoch has the remaining ones. With
    `whole_prompts` a step has as many whole prompts, with all their pairs, as `batch_size` allows;
    a prompt of more pairs than that is a step of its own.

    Attributes:
        count: number of training pairs.
        batch_size: pairs per optimizer step.
        seed: seed of the shuffling.
        prompts: number of each pair's group, (count,): the pairs of a prompt, which stay together.
            None shuffles the pairs one by one.
        whole_prompts: whether no prompt is divided between two steps. Needs `prompts`.
    """

    count: int
    batch_size: int
    seed: int
    prompts: np.ndarray | None = None
    whole_prompts: bool = False

    def __post_init__(self) -> None:
        if self.whole_prompts and self.prompts is None:
            raise ValueError("`whole_prompts` needs the numbers of the prompts")

    @classmethod
    def of(
        cls,
        pairs: Sequence[TokenizedPair],
        *,
        batch_size: int,
        seed: int,
        group_by_prompt: bool = False,
        whole_prompts: bool = False,
    ) -> Self:
        """Return the order of `pairs`; `whole_prompts` implies `group_by_prompt`."""
        prompts = group_numbers(pairs) if group_by_prompt or whole_prompts else None
        return cls(
            count=len(pairs),
            batch_size=batch_size,
            seed=seed,
            prompts=prompts,
            whole_prompts=whole_prompts,
        )

    def step(self, step: int) -> list[int]:
        """Return the indices of the pairs of one step; the first step of the run is number 0."""
        epoch, position = self._locate(step)
        order, ends = _epoch(self, epoch)
        indices: list[int] = order[ends[position] : ends[position + 1]].tolist()
        return indices

    def epoch_steps(self, epoch: int) -> list[list[int]]:
        """Return one list of pair indices for each step of epoch `epoch` (from 0)."""
        order, ends = _epoch(self, epoch)
        indices = order.tolist()
        return [indices[ends[i] : ends[i + 1]] for i in range(len(ends) - 1)]

    def first_steps(self, steps: int) -> list[int]:
        """Return the indices of the pairs that the first `steps` steps of the run see.

        The pairs of less than an epoch are in the order of the steps. From one epoch on all pairs
        are seen, and their order is that of the data set.
        """
        if steps >= self._steps_of(0):
            return list(range(self.count))
        order, ends = _epoch(self, 0)
        indices: list[int] = order[: ends[steps]].tolist()
        return indices

    def total_steps(self, epochs: int) -> int:
        """Return the number of steps of the first `epochs` epochs."""
        return sum(self._steps_of(epoch) for epoch in range(epochs))

    def epochs_after(self, steps: int) -> float:
        """Return the number of epochs after `steps` steps: whole ones, and the share of pairs."""
        epoch, position = self._locate(steps)
        if not self.whole_prompts:
            return epoch + position * self.batch_size / self.count
        return epoch + _epoch(self, epoch).ends[position] / self.count

    def count_groups(self) -> int:
        """Return the number of groups of pairs that stay together; `count` without `prompts`."""
        return self.count if self.prompts is None else int(self.prompts.max(initial=-1)) + 1

    def count_oversized_prompts(self) -> int:
        """Return the number of prompts of more than `batch_size` pairs."""
        return (
            0 if self.prompts is None else int((np.bincount(self.prompts) > self.batch_size).sum())
        )

    def _steps_of(self, epoch: int) -> int:
        """Return the number of steps of an epoch; it differs between epochs of whole prompts."""
        if not self.whole_prompts:
            return -(-self.count // self.batch_size)
        return _count_steps(self, epoch)

    def _locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the step's number in that epoch."""
        if not self.whole_prompts:
            return divmod(step, self._steps_of(0))
        epoch = 0
        while step >= self._steps_of(epoch):
            step -= self._steps_of(epoch)
            epoch += 1
        return epoch, step


def prompt_numbers(pairs: Sequence[TokenizedPair]) -> np.ndarray:
    """Return the number of each pair's prompt, from 0 in the order of `pairs`. (B,)"""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in prompt_keys(pairs)], np.int64)


def group_numbers(pairs: Sequence[TokenizedPair]) -> np.ndarray:
    """Return the number of each pair's group: the pairs of a prompt, each of them once. (B,)

    Copies of a pair, which `mix` and equal rows make, are in different groups: a step that sees a
    pair twice sees fewer different pairs. Copies of a ranked list are different groups as well.
    """
    places = column(pairs, RANKINGS)[:, :3].tolist()  # list, and completions in the list
    copies: Counter[object] = Counter()
    numbers: dict[object, int] = {}
    found = []
    for prompt, ids, place in zip(prompt_keys(pairs), pair_keys(pairs), places, strict=True):
        pair = prompt, ids, *place
        found.append(numbers.setdefault((prompt, copies[pair]), len(numbers)))
        copies[pair] += 1
    return np.array(found, np.int64)


class _Epoch(NamedTuple):
    """The pairs of an epoch, and where its steps begin and end."""

    order: np.ndarray  # (count,) indices of pairs
    ends: list[int]  # of the steps in `order`, after a 0


@lru_cache(maxsize=1)  # the steps of an epoch use the same permutation
def _epoch(pairs: PairOrder, epoch: int) -> _Epoch:
    # NumPy takes no negative seeds; modulo 2^64 leaves the others unchanged.
    generator = np.random.default_rng([pairs.seed % 2**64, epoch])
    order = generator.permutation(pairs.count)
    if pairs.prompts is not None:
        ranks = generator.permutation(pairs.count_groups())
        order = order[np.argsort(ranks[pairs.prompts[order]], kind="stable")]
    order.flags.writeable = False
    if pairs.whole_prompts:
        return _Epoch(order, _ends_of_whole_prompts(pairs, order))
    return _Epoch(order, [*range(0, pairs.count, pairs.batch_size), pairs.count])


@lru_cache(maxsize=64)
def _count_steps(pairs: PairOrder, epoch: int) -> int:
    return len(_epoch(pairs, epoch).ends) - 1


def _ends_of_whole_prompts(pairs: PairOrder, order: np.ndarray) -> list[int]:
    """Return where the steps of whole prompts end, after a 0."""
    assert pairs.prompts is not None
    changes = np.flatnonzero(np.diff(pairs.prompts[order])) + 1
    ends, before = [0], 0
    for end in [*changes.tolist(), pairs.count]:  # of a prompt
        if end - ends[-1] > pairs.batch_size and before > ends[-1]:
            ends.append(before)
        before = end
    return [*ends, pairs.count] if pairs.count else ends
