"""What scores pairs: one contract, two scorers. `policy.probe` decides between them.

A scorer gives the summed completion log-probabilities of pairs and can be differentiated
with respect to the model's trainable parameters inside `nn.value_and_grad`.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.policy.head import row_logps
from mlx_dpo.policy.logps import pair_logps
from mlx_dpo.policy.prefix import predicting_rows
from mlx_dpo.policy.tree import predicting_rows_of_tree
from mlx_dpo.policy.trunk import split
from mlx_dpo.preferences.batches import Cost, collate, one_row, shared_prompts
from mlx_dpo.types import PairLogps, TokenizedPair

Scorer = Callable[[nn.Module, Sequence[TokenizedPair]], PairLogps]  # (B,) float32 each


def plain_scorer(model: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps:
    """Whole rows, padded on the right: exact for every causal model. (B,) each"""
    return pair_logps(model, collate(pairs))


# How pairs that share their prompts go through a model together: behind one another in a row,
# as a batch whose prompts are padded, or as batches of those with equally long prompts.
Way = Literal["row", "batch", "lengths"]

COSTS: dict[Way, Cost] = {
    "row": one_row,
    "batch": partial(shared_prompts, together=True),
    "lengths": partial(shared_prompts, together=False),
}


def make_shared(*, vocab_size: int, gradients: bool, way: Way) -> Scorer:
    """A scorer that runs each prompt once, and the head only where a token is scored.

    Without `gradients` the values alone are right. For models that `policy.probe` has found
    it exact for.
    """
    predicting = predicting_rows_of_tree if way == "row" else predicting_rows

    def shared_scorer(model: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps:
        halves = split(model)
        groups = _groups(pairs, by_length=way == "lengths")
        rows = [predicting(model, halves, [pairs[i] for i in group]) for group in groups]
        completions = [
            completion
            for group in groups
            for side in ([pairs[i].chosen for i in group], [pairs[i].rejected for i in group])
            for completion in side
        ]
        logps = row_logps(
            halves,
            mx.concatenate(rows),
            mx.array([token for completion in completions for token in completion]),
            vocab_size=vocab_size,
            gradients=gradients,
        )
        return _by_pair(_sums(logps, completions), groups)

    return shared_scorer


def _groups(pairs: Sequence[TokenizedPair], *, by_length: bool) -> list[list[int]]:
    """Positions of the pairs that go through the model as one batch."""
    groups: dict[int, list[int]] = {}
    for position, pair in enumerate(pairs):
        groups.setdefault(len(pair.prompt) if by_length else 0, []).append(position)
    return list(groups.values())


def _sums(logps: mx.array, completions: Sequence[Sequence[int]]) -> list[mx.array]:
    """The sum over each completion, where they lie one after the other. () each"""
    ends = list(itertools.accumulate(len(completion) for completion in completions))
    return [part.sum() for part in mx.split(logps, ends[:-1])]


def _by_pair(sums: Sequence[mx.array], groups: Sequence[Sequence[int]]) -> PairLogps:
    """Sums that come as chosen, then rejected, of each group, in the order of the pairs."""
    chosen: dict[int, mx.array] = {}
    rejected: dict[int, mx.array] = {}
    waiting = iter(sums)
    for group in groups:
        chosen.update(zip(group, itertools.islice(waiting, len(group)), strict=True))
        rejected.update(zip(group, itertools.islice(waiting, len(group)), strict=True))
    order = range(len(chosen))
    return PairLogps(mx.stack([chosen[i] for i in order]), mx.stack([rejected[i] for i in order]))
