"""What a run makes small: losses of one or several kinds, and the rewards they imply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config.loss import LossSettings
from mlx_dpo.data.batching import pair_metadata
from mlx_dpo.losses.catalogue import LOSSES, LossKind
from mlx_dpo.losses.divergences import Divergence
from mlx_dpo.losses.log_ratios import View, averages, log_ratios
from mlx_dpo.losses.metrics import summarise
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.types import LossOutputs, PairLogps, PreferenceMetrics, ScoredPairs, TokenizedPair


@dataclass(frozen=True, kw_only=True)
class Objective(LossSettings):
    """A weighted sum of losses, with the settings they take."""

    @property
    def divergence(self) -> Divergence:
        """What keeps the policy near the reference."""
        return Divergence(self.f_divergence_type or "reverse_kl", self.alpha_of_divergence)

    def losses(self, scored: ScoredPairs, ratios: PairLogps) -> mx.array:
        """Return the loss of each pair; training minimizes the mean over a step. (B,)"""
        terms = zip(self.loss_kinds, self.weights_of_losses, strict=True)
        total = reduce(add, (weight * self._loss(kind, scored, ratios) for kind, weight in terms))
        return scored.metadata.weights * scored.on_policy_weights * total

    def outcomes(self, scored: ScoredPairs, ratios: PairLogps) -> LossOutputs:
        """Return losses and implied rewards of pairs with these log-ratios. (B,) each"""
        chosen, rejected = self.rewards(scored, ratios)
        return LossOutputs(self.losses(scored, ratios), scored, chosen, rejected)

    def rewards(self, scored: ScoredPairs, ratios: PairLogps) -> tuple[mx.array, mx.array]:
        """Those that the first loss implies that implies any, as TRL logs them. (B,) each

        beta times the log-ratio of the chosen and of the rejected completion; for losses
        without a reference, times the log-probability, or its average over tokens.
        """
        logps = scored.policy
        if self.rewarded == "log-ratio":
            logps = ratios
        if self.rewarded == "average log-probability":
            logps = averages(logps, scored.metadata)
        return self.loss_beta * logps.chosen, self.loss_beta * logps.rejected

    def _loss(self, kind: LossKind, scored: ScoredPairs, ratios: PairLogps) -> mx.array:
        settings = {name: self.read_by(kind, name) for name in kind.defaults}
        return LOSSES[kind.name](View(scored, ratios, self.divergence), **settings)


def evaluate(
    policy: nn.Module,
    pairs: Sequence[TokenizedPair],
    reference: PairLogps,
    objective: Objective,
    *,
    score: DatasetScorer,
    on_policy: Callable[[nn.Module, Sequence[TokenizedPair]], mx.array] | None = None,
) -> PreferenceMetrics:
    """Means over all of `pairs`, every pair with the same weight. Leaves evaluation mode on."""
    logps = score(policy, pairs)
    weights = mx.ones((len(pairs),)) if on_policy is None else on_policy(policy, pairs)
    scored = ScoredPairs(logps, reference, pair_metadata(pairs), weights)
    ratios = log_ratios(scored.policy, scored.reference)
    return summarise(objective.outcomes(scored, ratios), labelled=objective.labelled)
