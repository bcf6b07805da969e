"""How long it is trained, in which batches, and what a pass may cost."""

from dataclasses import dataclass
from typing import NamedTuple

from mlx_dpo.options import option

TRAINING = "Training"


class PassLimit(NamedTuple):
    """The most that one forward pass holds, both ways at once; None is no bound.

    A pair that is above `tokens` by itself goes alone.
    """

    pairs: int | None = None
    tokens: int | None = None

    def times(self, factor: int) -> "PassLimit":
        """A limit so many times as wide."""
        return PassLimit(*(bound and bound * factor for bound in self))


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How long it is trained, in which batches, and what a pass may cost."""

    epochs: int | None = option(None, "Passes over the pairs. [default: 1]", int, TRAINING, low=1)
    max_steps: int | None = option(
        None, "Optimizer steps, in place of epochs.", int, TRAINING, low=1
    )
    batch_size: int = option(16, "Pairs per optimizer step.", int, TRAINING, low=1)
    micro_batch_size: int | None = option(
        None, "Pairs per forward pass; for memory, not the result. "
        "[default: what fits, up to 2 on the CPU, 8 on a GPU]",
        int, TRAINING, low=1,
    )  # fmt: skip
    max_tokens: int | None = option(
        None, "Tokens per forward pass, with padding; a longer pair goes alone.",
        int, TRAINING, low=1,
    )  # fmt: skip
    scorer: str = option(
        "auto", "`shared`: each prompt once; `plain`: whole rows; `auto`: shared where exact.",
        str, TRAINING, choices=("auto", "plain", "shared"),
    )  # fmt: skip
    recompute: bool | None = option(
        None, "Compute each block again for its gradient: less memory, more time. "
        "[default: only where it does not fit without]",
        bool, TRAINING,
    )  # fmt: skip
    seed: int = option(
        42, "Seed of order, adapters, dropout and held-out share.", int, TRAINING, low=0
    )
