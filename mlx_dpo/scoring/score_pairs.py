"""Scoring of whole datasets without gradients: reference log-probabilities, evaluation, WPO."""

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batching import CountTokens, micro_batches, padded_row_tokens
from mlx_dpo.errors import TrainingError
from mlx_dpo.scoring.scorers import Scorer, fast_inference, plain_scorer
from mlx_dpo.types import PairLogps, TokenizedPair


class DatasetScorer(Protocol):
    """`score_pairs` with all arguments bound except model, pairs and progress."""

    def __call__(
        self,
        model: nn.Module,
        pairs: Sequence[TokenizedPair],
        *,
        progress: Callable[[int], None] = ...,
    ) -> PairLogps:
        """Return the log-probabilities of all pairs under `model`. (len(pairs),) each"""


def score_pairs(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    limit: PassLimit,
    scorer: Scorer = plain_scorer,
    cost: CountTokens = padded_row_tokens,
    progress: Callable[[int], None] = lambda scored: None,
) -> PairLogps:
    """Return the log-probabilities of all pairs under `model`, in order. (len(pairs),) each

    Pairs of similar length go through the model together. The model is left in evaluation mode.

    Args:
        limit: pairs or tokens per forward pass.
        cost: number of tokens that a pass with `scorer` takes.
        progress: called after each pass with the number of pairs in it.

    Raises:
        TrainingError: a log-probability is not a finite number.
    """
    model.eval()
    chosen = np.zeros(len(pairs), np.float32)
    rejected = np.zeros(len(pairs), np.float32)
    for indices in micro_batches(range(len(pairs)), pairs, limit, cost=cost):
        with fast_inference(model):
            logps = scorer(model, [pairs[i] for i in indices])
        mx.eval(logps)  # per batch: a graph over all batches would hold all logits
        chosen[indices], rejected[indices] = np.array(logps.chosen), np.array(logps.rejected)
        _check_finite(indices, chosen + rejected, pairs)
        progress(len(indices))
    return PairLogps(mx.array(chosen), mx.array(rejected))


def on_policy_weights(
    model: nn.Module, pairs: Sequence[TokenizedPair], *, score: DatasetScorer
) -> mx.array:
    """Return WPO's weight of each pair: how likely the policy is to write it. (len(pairs),)

    A pair sampled from the policy itself has a weight of about 1.

    Source: WPO, Zhou et al. 2024, arXiv:2406.11827, Eq. 2 with sampled alignment, as in TRL.

    Args:
        score: gives mean log-weights, see `scorers.plain_log_weights`.
    """
    chosen, rejected = score(model, pairs)
    return mx.exp(chosen + rejected)


def _check_finite(
    indices: Sequence[int], logps: np.ndarray, pairs: Sequence[TokenizedPair]
) -> None:
    """Raise `TrainingError` if a log-probability at `indices` is infinite or NaN."""
    for index in indices:
        if not np.isfinite(logps[index]):
            raise TrainingError(
                f"{pairs[index].location}: a completion has log-probability {logps[index]}; "
                "the model gives no finite number for it; try --dtype float32"
            )
