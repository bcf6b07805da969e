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

from mlx_dpo.policy.head import row_alignments, row_logps
from mlx_dpo.policy.logps import pair_alignments, pair_logps
from mlx_dpo.policy.masters import narrowed
from mlx_dpo.policy.prefix import predicting_rows
from mlx_dpo.policy.tree import predicting_rows_of_tree
from mlx_dpo.policy.trunk import split
from mlx_dpo.preferences.batches import Cost, collate, one_row, shared_prompts
from mlx_dpo.types import PairLogps, TokenizedPair

Scorer = Callable[[nn.Module, Sequence[TokenizedPair]], PairLogps]  # (B,) float32 each


def plain_scorer(
    model: nn.Module, pairs: Sequence[TokenizedPair], *, ld_alpha: float | None = None
) -> PairLogps:
    """Whole rows, padded on the right: exact for every causal model. (B,) each

    Tokens beyond the length of the shorter completion of a pair count `ld_alpha` times.
    """
    with narrowed(model):
        return pair_logps(model, collate(pairs), ld_alpha=ld_alpha)


def plain_alignments(model: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps:
    """In place of log-probabilities, means of `logps.token_alignments` over each completion:
    what WPO weighs pairs by. (B,) each
    """
    with narrowed(model):
        return pair_alignments(model, collate(pairs))


# How pairs that share their prompts go through a model together: behind one another in a row,
# as a batch whose prompts are padded, or as batches of those with equally long prompts.
Way = Literal["row", "batch", "lengths"]

COSTS: dict[Way, Cost] = {
    "row": one_row,
    "batch": partial(shared_prompts, together=True),
    "lengths": partial(shared_prompts, together=False),
}


def make_shared(
    *, vocab_size: int, gradients: bool, way: Way, ld_alpha: float | None = None
) -> Scorer:
    """A scorer that runs each prompt once, and the head only where a token is scored.

    Without `gradients` the values alone are right. For models that `policy.probe` has found
    it exact for.
    """
    values = partial(row_logps, vocab_size=vocab_size, gradients=gradients)
    return partial(_shared, way=way, values=values, total=partial(_sum, ld_alpha=ld_alpha))


def make_shared_alignments(*, vocab_size: int, way: Way) -> Scorer:
    """`plain_alignments` where each prompt runs once."""
    values = partial(row_alignments, vocab_size=vocab_size)
    return partial(_shared, way=way, values=values, total=lambda part, shorter: part.mean())


def _shared(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    way: Way,
    values: Callable[..., mx.array],
    total: Callable[[mx.array, int], mx.array],
) -> PairLogps:
    """`values` of all rows that predict, and the `total` of them over each completion, given
    the length of the shorter one of the pair. (B,) each
    """
    predicting = predicting_rows_of_tree if way == "row" else predicting_rows
    groups = _groups(pairs, by_length=way == "lengths")
    completions = [
        (completion, min(len(pairs[i].chosen), len(pairs[i].rejected)))
        for group in groups
        for side in ("chosen", "rejected")
        for i in group
        for completion in [getattr(pairs[i], side)]
    ]
    targets = mx.array([token for completion, _ in completions for token in completion])
    with narrowed(model):
        halves = split(model)
        hidden = [predicting(model, halves, [pairs[i] for i in group]) for group in groups]
        found = values(halves, mx.concatenate(hidden), targets)
    ends = list(itertools.accumulate(len(completion) for completion, _ in completions))
    parts = zip(mx.split(found, ends[:-1]), completions, strict=True)
    return _by_pair([total(part, shorter) for part, (_, shorter) in parts], groups)


def _sum(logps: mx.array, shorter: int, *, ld_alpha: float | None) -> mx.array:
    """Over a completion; what is beyond the shorter one of its pair counts `ld_alpha` times. ()"""
    if ld_alpha is None:
        return logps.sum()
    return logps[:shorter].sum() + ld_alpha * logps[shorter:].sum()


def _groups(pairs: Sequence[TokenizedPair], *, by_length: bool) -> list[list[int]]:
    """Positions of the pairs that go through the model as one batch."""
    groups: dict[int, list[int]] = {}
    for position, pair in enumerate(pairs):
        groups.setdefault(len(pair.prompt) if by_length else 0, []).append(position)
    return list(groups.values())


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
