"""Settings of the optimizer, its learning rate and gradient clipping."""

import math
from dataclasses import dataclass

from mlx_dpo.config.setting import NoEffect, is_set, setting
from mlx_dpo.errors import ConfigError
from mlx_dpo.optim.lr_schedule import LR_SCHEDULES, WARMUP_SETTINGS
from mlx_dpo.optim.optimizers import OPTIMIZERS

OPTIMIZER = "Optimizer"
MAX_STEPS_WITHOUT_WARMUP = 2  # with a warm-up step, half or all of the run would not train


def _beta(help: str, default_text: str) -> float | None:
    beta: float | None = setting(
        None,
        help,
        float,
        OPTIMIZER,
        minimum=0,
        maximum=1,
        exclusive_maximum=True,
        default_text=default_text,
    )
    return beta


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Settings of the optimizer, its learning rate and gradient clipping."""

    optim: str = setting(
        "adamw",
        "Optimizer. Muon updates the matrices of the layers; AdamW updates the rest at the "
        "same rate.",
        str,
        OPTIMIZER,
        choices=tuple(OPTIMIZERS),
        metavar="OPTIMIZER",
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate. The header shows the rate that was chosen, and why.",
        float,
        OPTIMIZER,
        minimum=0,
        exclusive_minimum=True,
        metavar="RATE",
        default_text="computed from model width, adapters, steps, completion length and optimizer",
        essential=True,
    )
    lr_scheduler_type: str = setting(
        "cosine",
        "Learning-rate schedule after the warm-up; `constant` has no warm-up.",
        str,
        OPTIMIZER,
        choices=tuple(LR_SCHEDULES),
        metavar="SCHEDULE",
    )
    min_lr_rate: float | None = setting(
        None,
        "Final learning rate of `cosine_with_min_lr`, as a fraction of the peak.",
        float,
        OPTIMIZER,
        minimum=0,
        maximum=1,
        exclusive_maximum=True,
        metavar="FRACTION",
        default_text="0.1",
    )
    warmup_ratio: float | None = setting(
        None,
        "Warm-up steps as a fraction of all steps.",
        float,
        OPTIMIZER,
        minimum=0,
        maximum=1,
        metavar="FRACTION",
        default_text="0.1",
    )
    warmup_steps: int | None = setting(
        None,
        "Warm-up steps (instead of `warmup_ratio`).",
        int,
        OPTIMIZER,
        minimum=0,
    )
    weight_decay: float = setting(
        0.0,
        "Decoupled weight decay (for SGD: L2 added to the gradient).",
        float,
        OPTIMIZER,
        minimum=0,
    )
    adam_beta1: float | None = _beta(
        "Decay rate of the running mean of the gradient.",
        "0.9",
    )
    adam_beta2: float | None = _beta(
        "Decay rate of the mean square of the gradient, or of Lion's momentum.",
        "0.999; Lion 0.99",
    )
    adam_epsilon: float | None = setting(
        None,
        "Epsilon in Adam's denominator.",
        float,
        OPTIMIZER,
        minimum=0,
        exclusive_minimum=True,
        default_text="1e-8",
    )
    momentum: float | None = _beta(
        "Momentum of SGD and Muon.",
        "0; Muon 0.95",
    )
    max_grad_norm: float = setting(
        1.0,
        "Clip the gradient norm to this; 0 disables clipping.",
        float,
        OPTIMIZER,
        minimum=0,
        metavar="NORM",
    )

    def count_warmup_steps(self, total_steps: int) -> int:
        """Return the number of warm-up steps in a run of `total_steps` optimizer steps.

        A run of one or two steps has none unless `warmup_steps` is set: the learning rate is 0 in
        the first step of a warm-up.
        """
        if "warmup_ratio" not in LR_SCHEDULES[self.lr_scheduler_type].settings:
            return 0
        if self.warmup_steps is not None:
            return self.warmup_steps
        if total_steps <= MAX_STEPS_WITHOUT_WARMUP:
            return 0
        return math.ceil((0.1 if self.warmup_ratio is None else self.warmup_ratio) * total_steps)

    @property
    def peak_learning_rate(self) -> float:
        """Setting `learning_rate`, which a run chooses before its first step if it is not set."""
        if self.learning_rate is None:
            raise ValueError("the learning rate is not chosen yet")
        return self.learning_rate

    @property
    def final_lr_share(self) -> float:
        """Final learning rate as a share of the peak; 0 unless the schedule has a minimum."""
        if "min_lr_rate" not in LR_SCHEDULES[self.lr_scheduler_type].settings:
            return 0.0
        return 0.1 if self.min_lr_rate is None else self.min_lr_rate


OPTIMIZER_NO_EFFECT: tuple[NoEffect[OptimizerSettings], ...] = (
    NoEffect(
        WARMUP_SETTINGS,
        lambda s: "warmup_ratio" not in LR_SCHEDULES[s.lr_scheduler_type].settings,
        lambda s: f"with lr_scheduler_type `{s.lr_scheduler_type}`; use `constant_with_warmup`",
    ),
    NoEffect(
        ("warmup_ratio",), lambda s: s.warmup_steps is not None, "together with `warmup_steps`"
    ),
    NoEffect(
        ("min_lr_rate",),
        lambda s: "min_lr_rate" not in LR_SCHEDULES[s.lr_scheduler_type].settings,
        lambda s: f"with lr_scheduler_type `{s.lr_scheduler_type}`; use `cosine_with_min_lr`",
    ),
)


def check_optimizer_settings(settings: OptimizerSettings) -> None:
    """Raise `ConfigError` for a setting that the chosen optimizer does not take."""
    taken = OPTIMIZERS[settings.optim].settings
    for entry in OPTIMIZERS.values():
        for name in entry.settings:
            if name not in taken and is_set(settings, name):
                raise ConfigError(f"`{name}` has no effect with optim `{settings.optim}`")
