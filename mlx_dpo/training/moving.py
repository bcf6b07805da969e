"""A reference that follows the policy: TR-DPO, on what is trained."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.arrays import Arrays, flat
from mlx_dpo.policy.scoring import Score
from mlx_dpo.types import PairLogps, TokenizedPair


class MovingReference:
    """Every so many steps, reference <- alpha policy + (1 - alpha) reference.

    It starts where the policy does. Until it moves, nothing is asked of it: what the
    reference said before the first step still holds. The factors of adapters are mixed one
    by one, as TRL mixes weights; for alpha = 1 it is the policy itself.

    Source: Gorbatovski et al. 2024, arXiv:2404.09656, Eq. 6 (soft) and Eq. 7 (hard, alpha = 1).
    """

    def __init__(self, policy: nn.Module, *, alpha: float, every: int, score: Score) -> None:
        """Start from the policy as it is before the first step."""
        self.alpha, self.every, self._score = alpha, every, score
        self.weights: Arrays = flat(policy.trainable_parameters())
        self.moved = False

    def restore(self, weights: Arrays) -> None:
        """Go on from the weights of a checkpoint at which it had moved."""
        self.weights, self.moved = weights, True

    def follow(self, policy: nn.Module, step: int) -> None:
        """Take a stride towards the policy, if `step` updates are a multiple of `every`."""
        if step % self.every:
            return
        own = flat(policy.trainable_parameters())
        self.weights = {
            name: self.alpha * own[name] + (1 - self.alpha) * value
            for name, value in self.weights.items()
        }
        mx.eval(self.weights)
        self.moved = True

    def logps(self, policy: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps | None:
        """What it says of the pairs, None while it is where it started. (len(pairs),) each"""
        if not self.moved:
            return None
        own = flat(policy.trainable_parameters())
        policy.update(tree_unflatten(list(self.weights.items())))
        try:
            return self._score(policy, pairs)
        finally:
            policy.update(tree_unflatten(list(own.items())))
