"""Log-probabilities of many pairs under one model, without gradients."""

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.errors import TrainingError
from mlx_dpo.policy.scorers import Scorer, plain_scorer
from mlx_dpo.policy.sparing import without_gradients
from mlx_dpo.preferences.batches import Cost, PassLimit, micro_batches, whole_rows
from mlx_dpo.types import PairLogps, TokenizedPair


class Score(Protocol):
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
    cost: Cost = whole_rows,
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
        with without_gradients(model):
            logps = scorer(model, [pairs[i] for i in group])
        mx.eval(logps)  # one batch at a time: a graph over all of them would hold every logit
        chosen[group], rejected[group] = np.array(logps.chosen), np.array(logps.rejected)
        _refuse_nan(group, chosen + rejected, pairs)
        progress(len(group))
    return PairLogps(mx.array(chosen), mx.array(rejected))


def on_policy_weights(
    model: nn.Module, pairs: Sequence[TokenizedPair], *, score: Score
) -> mx.array:
    """How much a policy would write both completions of each pair itself. (len(pairs),)

    `score` gives alignments in place of log-probabilities, see `scorers.plain_alignments`.
    A pair that the policy samples has a weight of about 1.

    Source: WPO, Zhou et al. 2024, arXiv:2406.11827, Eq. 2 with sampled alignment, as in TRL.
    """
    chosen, rejected = score(model, pairs)
    return mx.exp(chosen + rejected)


def _refuse_nan(group: Sequence[int], logps: np.ndarray, pairs: Sequence[TokenizedPair]) -> None:
    for index in group:
        if not np.isfinite(logps[index]):
            raise TrainingError(
                f"{pairs[index].where}: a completion has log-probability {logps[index]}; "
                "the model gives no finite number for it; try --dtype float32"
            )
