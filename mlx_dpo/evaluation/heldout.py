"""Preference metrics on pairs that were not trained on."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.objective.losses import log_ratio_margin
from mlx_dpo.objective.metrics import outcomes, summarise
from mlx_dpo.policy.scorers import Scorer, plain_scorer
from mlx_dpo.policy.scoring import score_pairs
from mlx_dpo.types import PairLogps, PreferenceMetrics, TokenizedPair


def evaluate(
    policy: nn.Module,
    pairs: Sequence[TokenizedPair],
    reference: PairLogps,
    pair_loss: Callable[[mx.array], mx.array],
    *,
    beta: float,
    pairs_per_pass: int,
    scorer: Scorer = plain_scorer,
) -> PreferenceMetrics:
    """Means over all of `pairs`, every pair with the same weight. Leaves evaluation mode on."""
    logps = score_pairs(policy, pairs, pairs_per_pass=pairs_per_pass, scorer=scorer)
    losses = pair_loss(log_ratio_margin(logps, reference))
    return summarise(outcomes(losses, logps, reference, beta=beta))
