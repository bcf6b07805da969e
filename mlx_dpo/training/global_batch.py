"""Losses that couple the pairs of a step, though they go through the model a few at a time.

The whole step is scored ahead, without gradients. Each micro-batch then computes the loss of
the whole step in which only its own log-probabilities are live: as parameters do not change
meanwhile, the gradients of all micro-batches add up to that of the step.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Self, cast

import mlx.core as mx
from mlx.utils import tree_map

from mlx_dpo.types import LossOutputs, PairLogps, ScoredPairs, TokenizedPair


class Among(NamedTuple):
    """A micro-batch among the pairs of its step."""

    whole: ScoredPairs  # (B,) each, as scored ahead
    at: mx.array  # (b,) places of the micro-batch's pairs in the step
    others: mx.array  # (B - b,) all other places
    order: mx.array  # (B,) where each place is found behind (at, others)

    @classmethod
    def of(cls, whole: ScoredPairs, at: Sequence[int]) -> Self:
        """The pairs `at` these places of the step."""
        others = [i for i in range(len(whole.policy.chosen)) if i not in set(at)]
        order = mx.argsort(mx.array([*at, *others]))
        return cls(whole, mx.array(list(at)), mx.array(others, dtype=mx.int32), order)

    def with_live(self, logps: PairLogps, *, labelled: bool) -> ScoredPairs:
        """The whole step, with these log-probabilities of the micro-batch. (B,) each

        Of labelled rows the mismatched completion is what it was ahead: no gradient flows
        through it.
        """
        ahead = self.whole.policy
        rejected = ahead.rejected[self.at] if labelled else logps.rejected
        return self.whole._replace(
            policy=PairLogps(
                self._put(logps.chosen, ahead.chosen), self._put(rejected, ahead.rejected)
            )
        )

    def own(self, outcome: LossOutputs) -> LossOutputs:
        """What concerns the micro-batch. (b,) each"""

        def own(x: mx.array) -> mx.array:
            return x[self.at] if x.ndim else x

        return cast(LossOutputs, tree_map(own, outcome))

    def _put(self, live: mx.array, ahead: mx.array) -> mx.array:
        return mx.concatenate([live, ahead[self.others]])[self.order]


def single(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Labelled rows to be scored with gradients: of the mismatched completion one token.

    It costs no token through the model's layers, for the prompt's last one predicts it.
    """
    return [replace(pair, rejected=pair.rejected[:1]) for pair in pairs]


def mismatched(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Labelled rows of which only the mismatched completion is asked about."""
    return [replace(pair, chosen=pair.chosen[:1]) for pair in pairs]
