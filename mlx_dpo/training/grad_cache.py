"""GradCache: split a step into micro-batches although its loss couples all pairs of the step.

First the log-probs of all pairs of the step are computed without gradients. Each micro-batch then
computes the loss of the whole step, with gradients through its own log-probs only. Parameters do
not change between micro-batches, so their gradients add up to the gradient of the step.

Source: Gao et al. 2021, arXiv:2101.06983.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Self, cast

import mlx.core as mx
from mlx.utils import tree_map

from mlx_dpo.types import LossOutputs, PairLogps, ScoredPairs, TokenizedPair


class GradCache(NamedTuple):
    """A micro-batch of b pairs, and the cached log-probs of all B pairs of its step."""

    step: ScoredPairs  # (B,) each, scored without gradients
    at: mx.array  # (b,) positions of the micro-batch in the step
    others: mx.array  # (B - b,) all other positions
    order: mx.array  # (B,) index of each position in the concatenation of `at` and `others`
    labelled: bool = False  # unpaired examples, whose `rejected` is the KL completion

    @classmethod
    def of(cls, step: ScoredPairs, at: Sequence[int], *, labelled: bool = False) -> Self:
        """Create the cache of a micro-batch.

        Args:
            step: log-probs and other loss inputs of all pairs of the step.
            at: positions of the micro-batch's pairs among the pairs of the step.
            labelled: whether the pairs are unpaired examples (KTO).
        """
        others = [i for i in range(len(step.policy.chosen)) if i not in set(at)]
        order = mx.argsort(mx.array([*at, *others]))
        return cls(step, mx.array(list(at)), mx.array(others, dtype=mx.int32), order, labelled)

    def with_gradients(self, logps: PairLogps) -> ScoredPairs:
        """Return the loss inputs of the whole step, with the micro-batch's log-probs replaced.

        `logps`, which carry gradients, replace the cached log-probs. Each array is (B,).

        KL completions of unpaired examples keep their cached log-probs, because the loss sends no
        gradient through them.
        """
        cached = self.step.policy
        rejected = cached.rejected[self.at] if self.labelled else logps.rejected
        return self.step._replace(
            policy=PairLogps(
                self._insert(logps.chosen, cached.chosen), self._insert(rejected, cached.rejected)
            )
        )

    def select(self, outputs: LossOutputs) -> LossOutputs:
        """Select the micro-batch's losses and rewards from those of the whole step. (b,) each"""

        def select(x: mx.array) -> mx.array:
            return x[self.at] if x.ndim else x

        return cast(LossOutputs, tree_map(select, outputs))

    def _insert(self, logps: mx.array, cached: mx.array) -> mx.array:
        return mx.concatenate([logps, cached[self.others]])[self.order]


def skip_kl_completions(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Return unpaired examples whose KL completions are cut to their first token.

    KL completions are mismatched completions from which KTO estimates the KL divergence. Passes
    with gradients do not need them. The remaining token costs nothing in the model's layers,
    because the prompt's last token predicts it.
    """
    return [replace(pair, rejected=pair.rejected[:1]) for pair in pairs]


def only_kl_completions(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Return unpaired examples whose own completions are cut to their first token.

    A pass over the result computes only the log-probs of the KL completions, from which KTO
    estimates the KL divergence.
    """
    return [replace(pair, chosen=pair.chosen[:1]) for pair in pairs]
