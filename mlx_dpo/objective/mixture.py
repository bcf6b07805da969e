"""What a run makes small: losses of one or several kinds, and the rewards they imply."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dpo.objective.losses import log_ratio_margin, sigmoid_loss
from mlx_dpo.types import PairOutcomes, Scored


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A weighted sum of losses, with the settings they take."""

    beta: float = 0.1
    label_smoothing: float = 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities matter to it."""
        return True

    @property
    def couples(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its step."""
        return False

    @property
    def labelled(self) -> bool:
        """Whether it takes single judged completions in place of pairs."""
        return False

    def losses(self, scored: Scored) -> mx.array:
        """The loss of each pair; the mean over a step's pairs is what is made small. (B,)"""
        margins = log_ratio_margin(scored.policy, scored.reference)
        return sigmoid_loss(margins, beta=self.beta, label_smoothing=self.label_smoothing)

    def outcomes(self, scored: Scored) -> PairOutcomes:
        """Losses and implied rewards of each pair. (B,) each"""
        chosen, rejected = self.rewards(scored)
        return PairOutcomes(self.losses(scored), scored, chosen, rejected)

    def rewards(self, scored: Scored) -> tuple[mx.array, mx.array]:
        """beta times the log-ratio of the chosen and of the rejected completion. (B,) each"""
        policy, reference = scored.policy, scored.reference
        return (
            self.beta * (policy.chosen - reference.chosen),
            self.beta * (policy.rejected - reference.rejected),
        )
