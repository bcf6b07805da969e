"""Inputs of the losses: log-ratios and margins, as sums or averages over tokens."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dpo.losses.divergences import Divergence
from mlx_dpo.types import PairLogps, PairMetadata, ScoredPairs


def log_ratios(policy: PairLogps, reference: PairLogps) -> PairLogps:
    """Return log π(y) - log π_ref(y) of each completion, in nats. (B,) each

    This subtraction comes before that of rejected from chosen, for accuracy: early in training
    policy and reference nearly agree, and subtracting close float32 numbers is exact.
    """
    return PairLogps(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def log_ratio_margin(policy: PairLogps, reference: PairLogps) -> mx.array:
    """Return the log-ratio of chosen minus that of rejected. (B,)"""
    return margin(log_ratios(policy, reference))


def token_averages(values: PairLogps, metadata: PairMetadata) -> PairLogps:
    """Return each completion's value divided by its number of tokens. (B,) each"""
    return PairLogps(
        values.chosen / metadata.chosen_tokens, values.rejected / metadata.rejected_tokens
    )


def margin(values: PairLogps) -> mx.array:
    """Return the values of chosen minus the values of rejected. (B,)"""
    return values.chosen - values.rejected


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a loss: log-probabilities, log-ratios, margins and metadata. (B,) each

    `margin` and `margin_per_token` are the f-divergence score of chosen minus that of rejected.
    For reverse KL, the default, the scores are the log-ratios.
    """

    scored: ScoredPairs
    log_ratios: PairLogps  # of policy and reference
    divergence: Divergence

    @property
    def policy(self) -> PairLogps:
        """Log-probabilities of the completions under the policy."""
        return self.scored.policy

    @property
    def reference(self) -> PairLogps:
        """Log-probabilities of the completions under the reference."""
        return self.scored.reference

    @property
    def metadata(self) -> PairMetadata:
        """Lengths, target margins, weights and labels of the pairs."""
        return self.scored.metadata

    @property
    def offset(self) -> mx.array:
        """Target reward margin of each pair, from the data's margin column; zeros without one."""
        return self.metadata.margins

    @property
    def margin(self) -> mx.array:
        """f-divergence score of chosen minus that of rejected (reverse KL: log-ratio margin)."""
        return margin(self._scores)

    @property
    def margin_per_token(self) -> mx.array:
        """Like `margin`, with each score divided by the number of tokens of its completion."""
        return margin(token_averages(self._scores, self.metadata))

    @property
    def policy_margin_per_token(self) -> mx.array:
        """Mean log-probability per token under the policy, of chosen minus that of rejected."""
        return margin(token_averages(self.scored.policy, self.metadata))

    @property
    def _scores(self) -> PairLogps:
        ratios = self.log_ratios
        return PairLogps(
            chosen=self.divergence.scores(ratios.chosen),
            rejected=self.divergence.scores(ratios.rejected),
        )
