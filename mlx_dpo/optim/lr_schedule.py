"""Learning-rate schedules by name, as pure functions of the step; the same as in Transformers.

Sources:
    transformers.optimization: get_scheduler and the functions that it calls.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

WARMUP_SETTINGS = ("warmup_ratio", "warmup_steps")
# Timescale of `inverse_sqrt` without a warm-up, as in Transformers: the rate hardly falls.
DEFAULT_TIMESCALE = 10_000


class DecayStep(NamedTuple):
    """An optimizer step after the warm-up: the input of the schedule functions."""

    step: int  # 0 for the first step after the warm-up
    total: int  # steps after the warm-up
    warmup: int  # steps of the warm-up
    min_lr_rate: float  # final learning rate as a share of the peak

    @property
    def progress(self) -> float:
        """Fraction of the steps after the warm-up that are done, from 0 to 1."""
        return self.step / max(1, self.total)


def _constant(at: DecayStep) -> float:
    return 1.0


def _linear(at: DecayStep) -> float:
    return 1.0 - at.progress


def _cosine(at: DecayStep) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * at.progress))


def _cosine_with_min_lr(at: DecayStep) -> float:
    return _cosine(at) * (1 - at.min_lr_rate) + at.min_lr_rate


def _inverse_sqrt(at: DecayStep) -> float:
    timescale = at.warmup or DEFAULT_TIMESCALE
    return 1.0 / math.sqrt((at.step + timescale) / timescale)


class ScheduleEntry(NamedTuple):
    """A schedule: function from step to fraction of the peak learning rate; names of settings."""

    share: Callable[[DecayStep], float]
    settings: tuple[str, ...] = WARMUP_SETTINGS


LR_SCHEDULES: Mapping[str, ScheduleEntry] = {
    "cosine": ScheduleEntry(_cosine),
    "cosine_with_min_lr": ScheduleEntry(_cosine_with_min_lr, (*WARMUP_SETTINGS, "min_lr_rate")),
    "linear": ScheduleEntry(_linear),
    "inverse_sqrt": ScheduleEntry(_inverse_sqrt),
    "constant": ScheduleEntry(_constant, ()),
    "constant_with_warmup": ScheduleEntry(_constant),
}


def learning_rate(
    step: int,
    *,
    peak: float,
    total: int,
    warmup: int,
    schedule: str = "cosine",
    min_lr_rate: float = 0.0,
) -> float:
    """Return the learning rate of optimizer step `step` (counted from 0) of `total` steps.

    The rate rises linearly from 0 during the first `warmup` steps (so the first step changes
    nothing, as in Transformers); then it follows the schedule.
    """
    if step < warmup:
        return peak * step / warmup
    at = DecayStep(step - warmup, total - warmup, warmup, min_lr_rate)
    return peak * max(0.0, LR_SCHEDULES[schedule].share(at))
