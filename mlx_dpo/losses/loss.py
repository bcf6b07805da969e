"""`Loss`: an entry of the catalogue of losses, with function, equation, defaults and source."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import mlx.core as mx

from mlx_dpo.losses.log_ratios import LossInputs

RewardKind = Literal["log-ratio", "log-probability", "average log-probability"]
BETA = {"beta": 0.1}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss: its name, its function, and the information that `mlx-dpo losses` prints.

    `function(inputs, s)` returns one loss per pair, (B,). `s` has the hyper-parameters of
    `defaults` as attributes and no others, so that a loss cannot read an undeclared setting.
    """

    name: str
    function: Callable[[LossInputs, SimpleNamespace], mx.array]
    equation: str  # of one pair
    source: str
    use: str  # when to use it
    defaults: Mapping[str, float]  # settings that the loss reads, with their default values
    reward: RewardKind | None = "log-ratio"  # rewards are beta times this; None: no implied reward
    needs_reference: bool = True
    uses_whole_batch: bool = False  # the loss of a pair depends on the other pairs of its step
    labelled: bool = False  # takes unpaired labelled examples instead of pairs
    listwise: bool = False  # the pairs that a loss depends on are those of one ranked list
    uses_margins: bool = False  # the margin column of the data acts on it
    uses_divergence: bool = False  # `f_divergence_type` acts on it

    @property
    def needs(self) -> tuple[str, ...]:
        """What the loss requires besides a policy and pairs, as phrases for display."""
        requirements = {
            "a reference": self.needs_reference,
            "labelled rows instead of pairs": self.labelled,
            "ranked lists": self.listwise,
            "the whole batch of a step": self.uses_whole_batch and not self.listwise,
        }
        return tuple(noun for noun, is_needed in requirements.items() if is_needed)
