"""A reference model that follows the policy (TR-DPO; TRL's `sync_ref_model`)."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.types import PairLogps, TokenizedPair


class SyncedReference:
    """A reference that moves towards the policy every few steps (TRL's `sync_ref_model`).

    An update sets the reference's weights to alpha * policy + (1 - alpha) * reference. The
    reference starts with the weights of the policy, so the precomputed reference log-probs are
    valid until the first update. Each adapter matrix is mixed separately, as in TRL. With alpha = 1
    the reference becomes a copy of the policy.

    Source: Gorbatovski et al. 2024, arXiv:2404.09656, Eq. 6 (soft) and Eq. 7 (hard, alpha = 1).
    """

    def __init__(
        self, policy: nn.Module, *, alpha: float, every: int, score: DatasetScorer
    ) -> None:
        """Create the reference from the policy's trainable weights before the first step.

        Args:
            policy: the model that is trained.
            alpha: share of the policy in an update of the reference, from 0 to 1.
            every: number of steps between two updates.
            score: function that computes log-probs of a dataset without gradients.
        """
        self.alpha, self.every, self._score = alpha, every, score
        self.weights: Arrays = named_arrays(policy.trainable_parameters())
        self.was_updated = False

    def restore(self, weights: Arrays) -> None:
        """Restore the reference's weights from a checkpoint."""
        self.weights, self.was_updated = weights, True

    def follow(self, policy: nn.Module, step: int) -> None:
        """Move the reference towards the policy if `step` is a multiple of `every`."""
        if step % self.every:
            return
        own = named_arrays(policy.trainable_parameters())
        self.weights = {
            name: self.alpha * own[name] + (1 - self.alpha) * value
            for name, value in self.weights.items()
        }
        mx.eval(self.weights)
        self.was_updated = True

    def logps(self, policy: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps | None:
        """Return the log-probs of `pairs` under this reference. (B,) each

        The result is None before the first update, when the precomputed log-probs are still valid.
        """
        if not self.was_updated:
            return None
        own = named_arrays(policy.trainable_parameters())
        policy.update(tree_unflatten(list(self.weights.items())))
        try:
            return self._score(policy, pairs)
        finally:
            policy.update(tree_unflatten(list(own.items())))
