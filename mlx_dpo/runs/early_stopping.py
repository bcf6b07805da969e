"""What a run's evaluations decide: whose adapters are kept, and whether it ends early.

The adapters of the best evaluation lie beside the checkpoints until the run is finished.
Several may: a run that goes on from an earlier checkpoint needs the best of then.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_dpo.adapters.files import WEIGHTS, load_adapter_weights
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.losses.metrics import METRICS
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.training.checkpoint import checkpoint_path, saved_steps, whole_folder
from mlx_dpo.types import MetricsRow

PREFIX = "eval_"


@dataclass(frozen=True)
class BestState:
    """How things stand after some evaluations."""

    step: int | None = None  # of the best one, if any had a value
    value: float = math.nan
    waited: int = 0  # evaluations in a row that were no improvement


@dataclass(frozen=True)
class EarlyStopping:
    """What an evaluation is judged by."""

    name: str  # as in the rows, with its prefix
    lower: bool
    patience: int | None
    threshold: float

    @classmethod
    def by(cls, metric: str, *, patience: int | None, threshold: float | None) -> "EarlyStopping":
        """Judge by the public name of a metric, with or without the prefix of evaluations.

        Raises:
            ConfigError: there is no such metric, or no better and worse in it.
        """
        known = {m.name: m.better == "lower" for m in METRICS.values() if m.better is not None}
        name = metric.removeprefix(PREFIX)
        if name not in known:
            raise ConfigError(
                f"`metric_for_best_model` must be one of {', '.join(sorted(known))}, got {metric!r}"
            )
        return cls(PREFIX + name, known[name], patience, threshold or 0.0)

    def standing(self, rows: Iterable[Mapping[str, float]]) -> BestState:
        """Where the evaluations among `rows` have led; other rows are passed over."""
        now = BestState()
        for row in rows:
            now = self.after(now, row)
        return now

    def after(self, before: BestState, row: Mapping[str, float]) -> BestState:
        """Where one more row leads."""
        if self.name not in row:
            return before
        step, value = int(row["step"]), row[self.name]
        if before.step is None:
            return before if math.isnan(value) else BestState(step, value)
        gain = before.value - value if self.lower else value - before.value
        # A small gain is the new best all the same; patience ends for want of large ones.
        waited = 0 if gain > self.threshold else before.waited + 1
        if gain > 0:
            return BestState(step, value, waited)
        return BestState(before.step, before.value, waited)

    def is_over(self, now: BestState) -> bool:
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


class BestCheckpoint:
    """The best evaluation so far; of a run that watches no metric, nothing."""

    def __init__(self, config: DPOConfig, paths: RunPaths) -> None:
        """Before any evaluation.

        Raises:
            ConfigError: the metric that is to be watched is not known.
        """
        self.paths = paths
        self.keeps = config.load_best_model_at_end
        self.watched: EarlyStopping | None = None
        if (metric := config.metric_for_best_model) is not None:
            patience, threshold = config.early_stopping_patience, config.early_stopping_threshold
            self.watched = EarlyStopping.by(metric, patience=patience, threshold=threshold)
        self.standing = BestState()

    def refuse_idle(self, *, every: int | None, total_steps: int, held_out: int) -> None:
        """Settings that can decide nothing in a run of so many steps.

        Raises:
            ConfigError: names the setting.
        """
        if self.watched is None or every is None:
            return
        between = (total_steps - 1) // every
        what = f"an evaluation every {every} of {total_steps} steps and one at the end"
        if not held_out or not between:
            why = what if held_out else "no pairs are held out"
            raise ConfigError(f"`metric_for_best_model` has nothing to choose between: {why}")
        patience = self.watched.patience
        if patience is not None and patience >= between:
            raise ConfigError(
                f"`early_stopping_patience` {patience} has no effect with {what}; "
                f"use less than {between}, or a smaller --eval-steps"
            )

    def go_on(self, rows: Sequence[MetricsRow]) -> None:
        """Stand where the rows up to a checkpoint lead.

        Raises:
            RunError: the adapters of the best evaluation are gone.
        """
        if self.watched is None:
            return
        self.standing = self.watched.standing(rows)
        if self.keeps and self.standing.step is not None and not self._place.is_dir():
            raise RunError(
                f"{self._place}: the adapters of the best evaluation are gone; "
                "put them back, or begin again with another --output"
            )

    def judge(self, row: MetricsRow, save: Callable[[Path], None]) -> None:
        """Judge an evaluation; `save` its adapters into a folder if it is the best."""
        if self.watched is None:
            return
        if self.watched.name not in row:
            raise ConfigError(
                f"`metric_for_best_model`: an evaluation has no `{self.watched.name}`, for the "
                "held-out answers are all good or all bad; watch `loss`, or hold out others"
            )
        before, self.standing = self.standing, self.watched.after(self.standing, row)
        if self.keeps and self.standing.step != before.step:
            with whole_folder(self._place) as partial:
                save(partial)

    @property
    def is_over(self) -> bool:
        """Whether the run is to end here."""
        return self.watched is not None and self.watched.is_over(self.standing)

    @property
    def kept(self) -> int | None:
        """The step whose adapters the run finishes with, None for the last."""
        return self.standing.step if self.keeps else None

    def prune(self, rows: Sequence[MetricsRow]) -> None:
        """Remove what no checkpoint that is left can still need."""
        if self.watched is None or not self.keeps:
            return
        needed = {self.standing.step}
        for step in saved_steps(self.paths.checkpoints):
            needed.add(self.watched.standing(r for r in rows if r["step"] <= step).step)
        for step in set(saved_steps(self.paths.best)) - needed:
            shutil.rmtree(checkpoint_path(self.paths.best, step), ignore_errors=True)

    def put_into(self, policy: nn.Module) -> None:
        """Give `policy` the adapters that are kept."""
        if self.kept is not None:
            load_adapter_weights(policy, self._place / WEIGHTS)

    def clear(self) -> None:
        """Remove all of them: the run is finished."""
        shutil.rmtree(self.paths.best, ignore_errors=True)

    def told(self) -> dict[str, Any] | None:
        """What was kept, for `run.json`."""
        if self.kept is None or self.watched is None:
            return None
        return {"step": self.kept, self.watched.name: self.standing.value}

    @property
    def _place(self) -> Path:
        assert self.standing.step is not None
        return checkpoint_path(self.paths.best, self.standing.step)
