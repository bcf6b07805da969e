"""What scores pairs: one contract, two scorers. `policy.probe` decides between them.

A scorer gives the summed completion log-probabilities of pairs and can be differentiated
with respect to the model's trainable parameters inside `nn.value_and_grad`.
"""

import itertools
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.policy.head import row_logps
from mlx_dpo.policy.logps import pair_logps
from mlx_dpo.policy.prefix import predicting_rows
from mlx_dpo.policy.trunk import split
from mlx_dpo.preferences.batches import collate
from mlx_dpo.types import PairLogps, TokenizedPair

Scorer = Callable[[nn.Module, Sequence[TokenizedPair]], PairLogps]  # (B,) float32 each


def plain_scorer(model: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps:
    """Whole rows, padded on the right: exact for every causal model. (B,) each"""
    return pair_logps(model, collate(pairs))


def make_shared(*, vocab_size: int, gradients: bool, pairs_together: bool) -> Scorer:
    """A scorer that runs each prompt once, and the head only where a token is scored.

    Pairs whose prompts are equally long go through the model together; all pairs do with
    `pairs_together`. Without `gradients` the values alone are right. For models that
    `policy.probe` has found it exact for.
    """

    def shared_scorer(model: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps:
        halves = split(model)
        groups = _groups(pairs, together=pairs_together)
        rows = [predicting_rows(model, halves, [pairs[i] for i in group]) for group in groups]
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


def _groups(pairs: Sequence[TokenizedPair], *, together: bool) -> list[list[int]]:
    """Positions of the pairs that go through the model as one batch."""
    by_length: dict[int, list[int]] = {}
    for position, pair in enumerate(pairs):
        by_length.setdefault(0 if together else len(pair.prompt), []).append(position)
    return list(by_length.values())


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
