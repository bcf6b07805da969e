"""What losses look at of a pair: log-ratios and margins, summed or averaged over tokens."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dpo.losses.divergences import Divergence
from mlx_dpo.types import PairLogps, PairMetadata, ScoredPairs


def log_ratios(policy: PairLogps, reference: PairLogps) -> PairLogps:
    """Of each completion, in nats. (B,) each

    They are taken first of all: policy and reference nearly agree early in training, and the
    difference of two close float32 numbers is exact.
    """
    return PairLogps(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def log_ratio_margin(policy: PairLogps, reference: PairLogps) -> mx.array:
    """How far the policy has moved towards chosen, relative to the reference. (B,)"""
    return difference(log_ratios(policy, reference))


def averages(values: PairLogps, metadata: PairMetadata) -> PairLogps:
    """What a token of each completion has on average. (B,) each"""
    return PairLogps(
        values.chosen / metadata.chosen_tokens, values.rejected / metadata.rejected_tokens
    )


def difference(values: PairLogps) -> mx.array:
    """How far chosen is ahead. (B,)"""
    return values.chosen - values.rejected


@dataclass(frozen=True)
class View:
    """Scored pairs under a divergence."""

    scored: ScoredPairs
    ratios: PairLogps  # log-ratios of policy and reference, (B,) each
    divergence: Divergence

    @property
    def metadata(self) -> PairMetadata:
        """What is known of the pairs. (B,) each"""
        return self.scored.metadata

    @property
    def margin(self) -> mx.array:
        """How far the policy has moved towards chosen. (B,)"""
        return difference(self._scores)

    @property
    def average_margin(self) -> mx.array:
        """The same in what a token has on average. (B,)"""
        return difference(averages(self._scores, self.metadata))

    @property
    def own_average_margin(self) -> mx.array:
        """How far chosen is ahead in the policy's log-probability of a token. (B,)"""
        return difference(averages(self.scored.policy, self.metadata))

    @property
    def _scores(self) -> PairLogps:
        return PairLogps(*(self.divergence.scores(ratio) for ratio in self.ratios))
