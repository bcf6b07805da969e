"""The training objective: a weighted sum of losses, and the implied rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config.loss import LossSettings
from mlx_dpo.data.batches.metadata import pair_metadata
from mlx_dpo.losses.divergences import Divergence
from mlx_dpo.losses.log_ratios import LossInputs, log_ratios, token_averages
from mlx_dpo.losses.metrics import compute_metrics
from mlx_dpo.phases import phase
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.types import LossOutputs, PairLogps, PreferenceMetrics, ScoredPairs, TokenizedPair


@dataclass(frozen=True)
class Objective:
    """The weighted sum of the losses that the settings name, and the implied rewards."""

    settings: LossSettings

    @property
    def labelled(self) -> bool:
        """Whether an example is one completion labelled good or bad (KTO), instead of a pair."""
        return self.settings.labelled

    @property
    def supervised(self) -> bool:
        """Whether an example is one answer without a rejected one (SFT), instead of a pair."""
        return self.settings.supervised

    @property
    def uses_whole_batch(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its step."""
        return self.settings.uses_whole_batch

    @property
    def couples_lists_only(self) -> bool:
        """Whether the other pairs that a loss depends on are those of the pair's ranked list."""
        losses = self.settings.losses
        return self.settings.listwise and all(x.listwise or not x.uses_whole_batch for x in losses)

    @property
    def divergence(self) -> Divergence:
        """The f-divergence that regularizes the policy towards the reference."""
        name = self.settings.f_divergence_type or "reverse_kl"
        return Divergence(name, self.settings.divergence_alpha)

    def compute_losses(self, scored: ScoredPairs, ratios: PairLogps) -> mx.array:
        """Return the weighted loss of each pair; training minimizes the mean over a step. (B,)

        Args:
            scored: pairs with their log-probs and weights.
            ratios: log-ratios of the pairs' completions between policy and reference, (B,) each.
        """
        inputs = LossInputs(scored, ratios, self.divergence)
        terms = [
            weight * loss.function(inputs, self.settings.get_hyperparameters(loss))
            for weight, loss in zip(
                self.settings.weights_of_losses, self.settings.losses, strict=True
            )
        ]
        return scored.metadata.weights * scored.on_policy_weights * reduce(add, terms)

    def compute_outputs(self, scored: ScoredPairs, ratios: PairLogps) -> LossOutputs:
        """Return the losses and the implied rewards of the pairs. (B,) each

        Args:
            ratios: log-ratios of the pairs' completions between policy and reference, (B,) each.
        """
        chosen, rejected = self.compute_rewards(scored, ratios)
        return LossOutputs(self.compute_losses(scored, ratios), scored, chosen, rejected)

    def compute_metrics(self, outputs: LossOutputs) -> PreferenceMetrics:
        """Return the metrics of the examples as means; see `losses.metrics.compute_metrics`."""
        return compute_metrics(outputs, labelled=self.labelled, supervised=self.supervised)

    def compute_rewards(self, scored: ScoredPairs, ratios: PairLogps) -> PairLogps:
        """Return the implied rewards of chosen and rejected completions. (B,) each

        A reward is beta times the log-ratio, as in TRL. For reference-free losses it is beta times
        the log-probability, or times its average over tokens. In a sum of losses, the reward is
        that of the first loss that implies one.
        """
        beta, kind, logps = self.settings.common_beta, self.settings.reward_kind, scored.policy
        if kind == "log-ratio":
            logps = ratios
        if kind == "average log-probability":
            logps = token_averages(logps, scored.metadata)
        return PairLogps(beta * logps.chosen, beta * logps.rejected)


def evaluate(
    policy: nn.Module,
    pairs: Sequence[TokenizedPair],
    reference: PairLogps,
    objective: Objective,
    *,
    score: DatasetScorer,
    on_policy: Callable[[nn.Module, Sequence[TokenizedPair]], mx.array] | None = None,
) -> PreferenceMetrics:
    """Return the means of loss, rewards and all other metrics over `pairs`.

    The loss of a pair is multiplied by its weight, as in training. The policy is left in
    evaluation mode.

    Args:
        reference: log-probs of `pairs` under the reference, (len(pairs),) each.
        score: function that computes log-probs of a dataset without gradients.
        on_policy: function that computes the WPO weights of pairs, (B,); None without WPO.
    """
    with phase("Evaluating", len(pairs), unit=objective.settings.unit) as advance:
        logps = score(policy, pairs, progress=advance)
    weights = mx.ones((len(pairs),)) if on_policy is None else on_policy(policy, pairs)
    scored = ScoredPairs(logps, reference, pair_metadata(pairs), weights)
    outputs = objective.compute_outputs(scored, log_ratios(logps, reference))
    return objective.compute_metrics(outputs)
