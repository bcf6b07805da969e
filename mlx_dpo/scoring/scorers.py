"""What scores pairs: one contract, two scorers. `policy.probe` decides between them.

A scorer gives the summed completion log-probabilities of pairs and can be differentiated
with respect to the model's trainable parameters inside `nn.value_and_grad`.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.adapters.master_weights import narrowed
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batching import (
    CountTokens,
    collate,
    micro_batches,
    packed_row_tokens,
    padded_row_tokens,
    shared_prompt_tokens,
)
from mlx_dpo.errors import TrainingError
from mlx_dpo.scoring.backbone import split_backbone
from mlx_dpo.scoring.lm_head import chunked_log_weights, chunked_logps
from mlx_dpo.scoring.logps import pair_log_weights, pair_logps
from mlx_dpo.scoring.memory_saving import fast_inference
from mlx_dpo.scoring.packing import packed_hidden_states
from mlx_dpo.scoring.shared_prefix import completion_hidden_states
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


def plain_log_weights(model: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps:
    """In place of log-probabilities, means of `logps.token_alignments` over each completion:
    what WPO weighs pairs by. (B,) each
    """
    with narrowed(model):
        return pair_log_weights(model, collate(pairs))


# How pairs that share their prompts go through a model together: behind one another in a row,
# as a batch whose prompts are padded, or as batches of those with equally long prompts.
Packing = Literal["row", "batch", "lengths"]

TOKEN_COUNTS: dict[Packing, CountTokens] = {
    "row": packed_row_tokens,
    "batch": partial(shared_prompt_tokens, together=True),
    "lengths": partial(shared_prompt_tokens, together=False),
}


def make_shared_scorer(
    *, vocab_size: int, gradients: bool, way: Packing, ld_alpha: float | None = None
) -> Scorer:
    """A scorer that runs each prompt once, and the head only where a token is scored.

    Without `gradients` the values alone are right. For models that `policy.probe` has found
    it exact for.
    """
    values = partial(chunked_logps, vocab_size=vocab_size, gradients=gradients)
    return partial(
        _score_with_shared_prompts,
        way=way,
        values=values,
        total=partial(_sum_logps, ld_alpha=ld_alpha),
    )


def make_shared_log_weights(*, vocab_size: int, way: Packing) -> Scorer:
    """`plain_alignments` where each prompt runs once."""
    values = partial(chunked_log_weights, vocab_size=vocab_size)
    return partial(
        _score_with_shared_prompts, way=way, values=values, total=lambda part, shorter: part.mean()
    )


def _score_with_shared_prompts(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    way: Packing,
    values: Callable[..., mx.array],
    total: Callable[[mx.array, int], mx.array],
) -> PairLogps:
    """`values` of all rows that predict, and the `total` of them over each completion, given
    the length of the shorter one of the pair. (B,) each
    """
    predicting = packed_hidden_states if way == "row" else completion_hidden_states
    groups = _batches(pairs, by_length=way == "lengths")
    completions = [
        (completion, min(len(pairs[i].chosen), len(pairs[i].rejected)))
        for group in groups
        for side in ("chosen", "rejected")
        for i in group
        for completion in [getattr(pairs[i], side)]
    ]
    targets = mx.array([token for completion, _ in completions for token in completion])
    with narrowed(model):
        halves = split_backbone(model)
        hidden = [predicting(model, halves, [pairs[i] for i in group]) for group in groups]
        found = values(halves, mx.concatenate(hidden), targets)
    ends = list(itertools.accumulate(len(completion) for completion, _ in completions))
    parts = zip(mx.split(found, ends[:-1]), completions, strict=True)
    return _in_pair_order([total(part, shorter) for part, (_, shorter) in parts], groups)


def _sum_logps(logps: mx.array, shorter: int, *, ld_alpha: float | None) -> mx.array:
    """Over a completion; what is beyond the shorter one of its pair counts `ld_alpha` times. ()"""
    if ld_alpha is None:
        return logps.sum()
    return logps[:shorter].sum() + ld_alpha * logps[shorter:].sum()


def _batches(pairs: Sequence[TokenizedPair], *, by_length: bool) -> list[list[int]]:
    """Positions of the pairs that go through the model as one batch."""
    groups: dict[int, list[int]] = {}
    for position, pair in enumerate(pairs):
        groups.setdefault(len(pair.prompt) if by_length else 0, []).append(position)
    return list(groups.values())


def _in_pair_order(sums: Sequence[mx.array], groups: Sequence[Sequence[int]]) -> PairLogps:
    """Sums that come as chosen, then rejected, of each group, in the order of the pairs."""
    chosen: dict[int, mx.array] = {}
    rejected: dict[int, mx.array] = {}
    waiting = iter(sums)
    for group in groups:
        chosen.update(zip(group, itertools.islice(waiting, len(group)), strict=True))
        rejected.update(zip(group, itertools.islice(waiting, len(group)), strict=True))
    order = range(len(chosen))
    return PairLogps(mx.stack([chosen[i] for i in order]), mx.stack([rejected[i] for i in order]))


class DatasetScorer(Protocol):
    """`score_pairs` with all but the model and the pairs decided."""

    def __call__(
        self,
        model: nn.Module,
        pairs: Sequence[TokenizedPair],
        *,
        progress: Callable[[int], None] = ...,
    ) -> PairLogps:
        """Log-probabilities of every pair under `model`. (len(pairs),) each"""


def score_pairs(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    limit: PassLimit,
    scorer: Scorer = plain_scorer,
    cost: CountTokens = padded_row_tokens,
    progress: Callable[[int], None] = lambda scored: None,
) -> PairLogps:
    """Log-probabilities of every pair under `model`, in the order of `pairs`. (len(pairs),) each

    Pairs of like length go through the model together; `progress` hears how many did.
    The model is left in evaluation mode.

    Raises:
        TrainingError: a log-probability is not a finite number.
    """
    model.eval()
    chosen = np.zeros(len(pairs), np.float32)
    rejected = np.zeros(len(pairs), np.float32)
    for group in micro_batches(range(len(pairs)), pairs, limit, cost=cost):
        with fast_inference(model):
            logps = scorer(model, [pairs[i] for i in group])
        mx.eval(logps)  # one batch at a time: a graph over all of them would hold every logit
        chosen[group], rejected[group] = np.array(logps.chosen), np.array(logps.rejected)
        _check_finite(group, chosen + rejected, pairs)
        progress(len(group))
    return PairLogps(mx.array(chosen), mx.array(rejected))


def on_policy_weights(
    model: nn.Module, pairs: Sequence[TokenizedPair], *, score: DatasetScorer
) -> mx.array:
    """How much a policy would write both completions of each pair itself. (len(pairs),)

    `score` gives alignments in place of log-probabilities, see `scorers.plain_alignments`.
    A pair that the policy samples has a weight of about 1.

    Source: WPO, Zhou et al. 2024, arXiv:2406.11827, Eq. 2 with sampled alignment, as in TRL.
    """
    chosen, rejected = score(model, pairs)
    return mx.exp(chosen + rejected)


def _check_finite(group: Sequence[int], logps: np.ndarray, pairs: Sequence[TokenizedPair]) -> None:
    for index in group:
        if not np.isfinite(logps[index]):
            raise TrainingError(
                f"{pairs[index].location}: a completion has log-probability {logps[index]}; "
                "the model gives no finite number for it; try --dtype float32"
            )
