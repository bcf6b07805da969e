"""How the weights are moved: the optimizer, its learning rate, and what it does to gradients."""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from mlx_dpo.config.option import option
from mlx_dpo.errors import ConfigError

OPTIMIZER = "Optimizer"


class Kind(NamedTuple):
    """An optimizer: how it is called, and which settings it has."""

    title: str
    takes: tuple[str, ...]


KINDS = {
    "adamw": Kind("AdamW", ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")),
    "adam": Kind("Adam", ("adam_beta1", "adam_beta2", "adam_epsilon")),
    "adafactor": Kind("Adafactor", ("weight_decay",)),
    "lion": Kind("Lion", ("weight_decay", "adam_beta1", "adam_beta2")),
    "muon": Kind("Muon", ("weight_decay", "momentum")),
    "sgd": Kind("SGD", ("weight_decay", "momentum")),
    "rmsprop": Kind("RMSprop", ()),
}
SCHEDULES = (
    "cosine",
    "cosine_with_min_lr",
    "linear",
    "inverse_sqrt",
    "constant",
    "constant_with_warmup",
)


def _beta(help: str) -> float | None:
    beta: float | None = option(None, help, float, OPTIMIZER, low=0, high=1, open_high=True)
    return beta


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the weights are moved."""

    optim: str = option(
        "adamw",
        "What moves the weights. Muon moves matrices in the blocks; AdamW, at its rate, the rest.",
        str,
        OPTIMIZER,
        choices=tuple(KINDS),
    )
    learning_rate: float = option(
        5e-6,
        "Peak learning rate. Adam and Adafactor want AdamW's, RMSprop less, Lion a third to a "
        "tenth of it, Muon several times and SGD hundreds of times as much.",
        float,
        OPTIMIZER,
        low=0,
        open_low=True,
    )
    lr_scheduler_type: str = option(
        "cosine",
        "Learning rate after the warm-up; `constant` has none.",
        str,
        OPTIMIZER,
        choices=SCHEDULES,
    )
    min_lr_rate: float | None = option(
        None,
        "Share of the peak that `cosine_with_min_lr` ends at. [default: 0.1]",
        float,
        OPTIMIZER,
        low=0,
        high=1,
        open_high=True,
    )
    warmup_ratio: float | None = option(
        None,
        "Share of the steps in which the learning rate rises. [default: 0.1]",
        float,
        OPTIMIZER,
        low=0,
        high=1,
    )
    warmup_steps: int | None = option(
        None, "Steps in which it rises, in place of a share.", int, OPTIMIZER, low=0
    )
    weight_decay: float = option(
        0.0,
        "Weight decay: taken off beside the update, by SGD added to the gradient.",
        float,
        OPTIMIZER,
        low=0,
    )
    adam_beta1: float | None = _beta("Share of the mean gradient kept at each step. [default: 0.9]")
    adam_beta2: float | None = _beta(
        "Share of the mean square kept, or of Lion's momentum. [default: 0.999; Lion 0.99]"
    )
    adam_epsilon: float | None = option(
        None, "Added to Adam's denominator. [default: 1e-8]", float, OPTIMIZER, low=0, open_low=True
    )
    momentum: float | None = _beta("Momentum of SGD and Muon. [default: 0; Muon 0.95]")
    max_grad_norm: float = option(
        1.0, "Clip the global gradient norm to this; 0 leaves it.", float, OPTIMIZER, low=0
    )

    def refuse_idle_optimizer_settings(self) -> None:
        """Settings that the chosen optimizer or schedule does not have.

        Raises:
            ConfigError: names the first of them.
        """
        takes, schedule = KINDS[self.optim].takes, self.lr_scheduler_type
        some_take = {name for kind in KINDS.values() for name in kind.takes}
        for f in fields(OptimizerSettings):
            is_set = getattr(self, f.name) != f.default
            if is_set and f.name in some_take - set(takes):
                raise ConfigError(f"`{f.name}` has no effect with optim `{self.optim}`")
            if is_set and f.name.startswith("warmup") and schedule == "constant":
                raise ConfigError(
                    f"`{f.name}` has no effect with lr_scheduler_type `constant`; "
                    "use `constant_with_warmup`"
                )
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ConfigError("`warmup_ratio` has no effect beside `warmup_steps`")
        if self.min_lr_rate is not None and schedule != "cosine_with_min_lr":
            raise ConfigError(
                f"`min_lr_rate` has no effect with lr_scheduler_type `{schedule}`; "
                "use `cosine_with_min_lr`"
            )

    def warmup(self, total_steps: int) -> int:
        """Updates in which the learning rate rises, in a run of so many."""
        if self.lr_scheduler_type == "constant":
            return 0
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil((0.1 if self.warmup_ratio is None else self.warmup_ratio) * total_steps)

    @property
    def floor(self) -> float:
        """Share of the peak rate that the schedule ends at."""
        if self.lr_scheduler_type != "cosine_with_min_lr":
            return 0.0
        return 0.1 if self.min_lr_rate is None else self.min_lr_rate
