"""Preference metrics on pairs that were not trained on."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.objective.losses import log_ratio_margin
from mlx_dpo.objective.metrics import outcomes, summarise
from mlx_dpo.policy.scoring import Score
from mlx_dpo.types import PairLogps, PreferenceMetrics, TokenizedPair


def evaluate(
    policy: nn.Module,
    pairs: Sequence[TokenizedPair],
    reference: PairLogps,
    pair_loss: Callable[[mx.array], mx.array],
    *,
    beta: float,
    score: Score,
) -> PreferenceMetrics:
    """Means over all of `pairs`, every pair with the same weight. Leaves evaluation mode on."""
    logps = score(policy, pairs)
    losses = pair_loss(log_ratio_margin(logps, reference))
    return summarise(outcomes(losses, logps, reference, beta=beta))
