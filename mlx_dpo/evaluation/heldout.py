"""Preference metrics on pairs that were not trained on."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.objective.metrics import summarise
from mlx_dpo.objective.mixture import Objective
from mlx_dpo.policy.scoring import Score
from mlx_dpo.preferences.facts import facts_of
from mlx_dpo.types import PairLogps, PreferenceMetrics, Scored, TokenizedPair


def evaluate(
    policy: nn.Module,
    pairs: Sequence[TokenizedPair],
    reference: PairLogps,
    objective: Objective,
    *,
    score: Score,
    on_policy: Callable[[nn.Module, Sequence[TokenizedPair]], mx.array] | None = None,
) -> PreferenceMetrics:
    """Means over all of `pairs`, every pair with the same weight. Leaves evaluation mode on."""
    logps = score(policy, pairs)
    weights = mx.ones((len(pairs),)) if on_policy is None else on_policy(policy, pairs)
    scored = Scored(logps, reference, facts_of(pairs), weights)
    return summarise(objective.outcomes(scored), labelled=objective.labelled)
