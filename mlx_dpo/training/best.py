"""Which evaluation was the best, and whether to stop: a pure function of the rows so far.

So a run that goes on from a checkpoint decides what it would have decided without stopping.
The rules are those of Transformers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlx_dpo.errors import ConfigError
from mlx_dpo.objective.metrics import NAMES

LOWER_IS_BETTER = {
    "loss": True,
    "chosen_rewards": False,
    "rejected_rewards": True,
    "margins": False,
    "accuracies": False,
    "chosen_logps": False,
    "rejected_logps": True,
}
PREFIX = "eval_"


@dataclass(frozen=True)
class Standing:
    """How things stand after some evaluations."""

    step: int | None = None  # of the best one, if any had a value
    value: float = math.nan
    waited: int = 0  # evaluations in a row that were no improvement


@dataclass(frozen=True)
class Watched:
    """What an evaluation is judged by."""

    name: str  # as in the rows, with its prefix
    lower: bool
    patience: int | None
    threshold: float

    @classmethod
    def by(cls, metric: str, *, patience: int | None, threshold: float | None) -> "Watched":
        """Judge by the public name of a metric, with or without the prefix of evaluations.

        Raises:
            ConfigError: there is no such metric, or no better and worse in it.
        """
        known = {NAMES[field]: lower for field, lower in LOWER_IS_BETTER.items()}
        name = metric.removeprefix(PREFIX)
        if name not in known:
            raise ConfigError(
                f"`metric_for_best_model` must be one of {', '.join(sorted(known))}, got {metric!r}"
            )
        return cls(PREFIX + name, known[name], patience, threshold or 0.0)

    def standing(self, rows: Iterable[Mapping[str, float]]) -> Standing:
        """Where the evaluations among `rows` have led; other rows are passed over."""
        now = Standing()
        for row in rows:
            now = self.after(now, row)
        return now

    def after(self, before: Standing, row: Mapping[str, float]) -> Standing:
        """Where one more row leads."""
        if self.name not in row:
            return before
        step, value = int(row["step"]), row[self.name]
        if before.step is None:
            return before if math.isnan(value) else Standing(step, value)
        gain = before.value - value if self.lower else value - before.value
        # A small gain is the new best all the same; patience ends for want of large ones.
        waited = 0 if gain > self.threshold else before.waited + 1
        if gain > 0:
            return Standing(step, value, waited)
        return Standing(before.step, before.value, waited)

    def is_over(self, now: Standing) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and now.waited >= self.patience

    def line(self, *, keeps: bool) -> str:
        """What follows from it, for a person."""
        what = f"{'lowest' if self.lower else 'highest'} {self.name}"
        parts = [f"the adapters of the {what} are kept"] if keeps else []
        if self.patience is not None:
            more = f" of more than {self.threshold:g}" if self.threshold else ""
            parts.append(f"stops after {self.patience} evaluations without an improvement{more}")
            parts[-1] += "" if keeps else f" ({what})"
        return "; ".join(parts)
