"""Inputs of the losses: log-ratios and margins, as sums or averages over tokens."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dpo.losses.divergences import Divergence
from mlx_dpo.types import PairLogps, PairMetadata, ScoredPairs


def log_ratios(policy: PairLogps, reference: PairLogps) -> PairLogps:
    """Return log π(y) - log π_ref(y) of each completion, in nats. (B,) each

    Policy and reference are subtracted before chosen and rejected are: early in training policy
    and reference nearly agree, and the difference of two close float32 numbers is exact.
    """
    return PairLogps(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def log_ratio_margin(policy: PairLogps, reference: PairLogps) -> mx.array:
    """Return the log-ratio of chosen minus that of rejected. (B,)"""
    return margin(log_ratios(policy, reference))


def token_averages(values: PairLogps, metadata: PairMetadata) -> PairLogps:
    """Return the values divided by the number of tokens of each completion. (B,) each"""
    return PairLogps(
        values.chosen / metadata.chosen_tokens, values.rejected / metadata.rejected_tokens
    )


def margin(values: PairLogps) -> mx.array:
    """Return chosen minus rejected. (B,)"""
    return values.chosen - values.rejected


@dataclass(frozen=True)
class LossInputs:
    """Scored pairs, and the quantities that losses are functions of. (B,) each

    Margins are those of the divergence's scores, which are the log-ratios for reverse KL.
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
        """Lengths, margins and labels of the pairs."""
        return self.scored.metadata

    @property
    def offset(self) -> mx.array:
        """Target reward margin of each pair, from the margin column of the data; else zeros."""
        return self.metadata.margins

    @property
    def margin(self) -> mx.array:
        """Score of chosen minus that of rejected."""
        return margin(self._scores)

    @property
    def margin_per_token(self) -> mx.array:
        """Margin of the scores, each averaged over the tokens of its completion."""
        return margin(token_averages(self._scores, self.metadata))

    @property
    def policy_margin_per_token(self) -> mx.array:
        """Margin of the policy's log-probabilities, averaged over tokens; no reference."""
        return margin(token_averages(self.scored.policy, self.metadata))

    @property
    def _scores(self) -> PairLogps:
        ratios = self.log_ratios
        return PairLogps(
            chosen=self.divergence.scores(ratios.chosen),
            rejected=self.divergence.scores(ratios.rejected),
        )
