"""Early stopping and the best checkpoint, decided by a metric of the evaluations.

The adapters of the best evaluation are saved next to the checkpoints until the run is finished.
Adapters of several evaluations may be saved at a time, because a run that resumes from an earlier
checkpoint needs the adapters that were best at that checkpoint.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_dpo.adapters.adapter_files import CONFIG, WEIGHTS, load_adapter_weights
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.checksums import damaged, verify_file
from mlx_dpo.losses.metrics import EVAL_PREFIX, METRICS
from mlx_dpo.reporting.metrics_log import undamaged_rows
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.training.checkpoint import (
    CheckpointState,
    checkpoint_path,
    saved_steps,
    whole_folder,
)


@dataclass(frozen=True)
class BestState:
    """The best evaluation so far, and the number of evaluations since the last improvement."""

    step: int | None = None  # None before the first evaluation with a value
    value: float = math.nan
    num_without_improvement: int = 0  # evaluations in a row


@dataclass(frozen=True)
class EarlyStopping:
    """Rule that decides by a metric which evaluation is best and when the run stops early."""

    metric: str  # with its prefix, as in the rows of metrics
    lower_is_better: bool
    patience: int | None
    threshold: float

    @classmethod
    def for_metric(
        cls, metric: str, *, patience: int | None, threshold: float | None
    ) -> "EarlyStopping":
        """Create the rule that compares evaluations by `metric`.

        Args:
            metric: name of the metric, with or without the prefix `eval_`.
            patience: number of evaluations without an improvement after which the run stops; None
                means no early stopping.
            threshold: gain in the metric above which an evaluation counts as an improvement.

        Raises:
            ConfigError: the metric does not exist, or neither higher nor lower values are better.
        """
        known = {m.name: m.better == "lower" for m in METRICS.values() if m.better is not None}
        name = metric.removeprefix(EVAL_PREFIX)
        if name not in known:
            raise ConfigError(
                f"`metric_for_best_model` must be one of {', '.join(sorted(known))}, got {metric!r}"
            )
        return cls(EVAL_PREFIX + name, known[name], patience, threshold or 0.0)

    def state_after(self, rows: Iterable[Mapping[str, float]]) -> BestState:
        """Return the best evaluation, and evaluations since it improved, in the metrics `rows`.

        Rows of training steps are ignored.
        """
        state = BestState()
        for row in rows:
            state = self.update(state, row)
        return state

    def update(self, state: BestState, row: Mapping[str, float]) -> BestState:
        """Return the best evaluation so far, given one more row; training rows change nothing."""
        if self.metric not in row:
            return state
        step, value = int(row["step"]), row[self.metric]
        if state.step is None:
            return state if math.isnan(value) else BestState(step, value)
        gain = state.value - value if self.lower_is_better else value - state.value
        # A gain below the threshold is still the new best; it does not reset the patience.
        waited = 0 if gain > self.threshold else state.num_without_improvement + 1
        if gain > 0:
            return BestState(step, value, waited)
        return BestState(state.step, state.value, waited)

    def should_stop(self, state: BestState) -> bool:
        """Return whether the last `patience` evaluations all brought no improvement."""
        return self.patience is not None and state.num_without_improvement >= self.patience

    def describe(self, *, load_best_at_end: bool) -> str:
        """Describe when the run stops early and which adapters it ends with.

        The text is printed before training.

        Args:
            load_best_at_end: whether the run ends with the adapters of the best evaluation.
        """
        what = f"{'lowest' if self.lower_is_better else 'highest'} {self.metric}"
        parts = [f"the run ends with the adapters of the {what}"] if load_best_at_end else []
        if self.patience is not None:
            more = f" of more than {self.threshold:g}" if self.threshold else ""
            parts.append(f"stops after {self.patience} evaluations without an improvement{more}")
            parts[-1] += "" if load_best_at_end else f" ({what})"
        return "; ".join(parts)


Row = Mapping[str, float]


class BestCheckpoint:
    """The best evaluation of a run and its adapters; inactive without `metric_for_best_model`."""

    def __init__(self, config: DPOConfig, paths: RunPaths) -> None:
        """Create the state of a run that has not evaluated yet.

        Raises:
            ConfigError: `metric_for_best_model` is not a known metric.
        """
        self.paths = paths
        self.load_best_at_end = config.load_best_model_at_end
        self.rule: EarlyStopping | None = None
        if (metric := config.metric_for_best_model) is not None:
            patience, threshold = config.early_stopping_patience, config.early_stopping_threshold
            self.rule = EarlyStopping.for_metric(metric, patience=patience, threshold=threshold)
        self.state = BestState()

    def check_has_effect(self, *, every: int | None, total_steps: int, held_out: int) -> None:
        """Raise `ConfigError` if best checkpoint or early stopping can have no effect in the run.

        Args:
            every: number of steps between two evaluations; None means no evaluations during
                training.
            total_steps: number of optimizer steps of the run.
            held_out: number of held-out pairs.
        """
        if self.rule is None or every is None:
            return
        between = (total_steps - 1) // every
        what = f"an evaluation every {every} of {total_steps} steps and one at the end"
        if not held_out or not between:
            why = what if held_out else "no pairs are held out"
            raise ConfigError(
                f"`metric_for_best_model` needs several evaluations to choose from: {why}"
            )
        patience = self.rule.patience
        if patience is not None and patience >= between:
            raise ConfigError(
                f"`early_stopping_patience` {patience} has no effect with {what}; "
                f"use less than {between}, or a smaller --eval-steps"
            )

    def check_resumable(self, state: CheckpointState) -> None:
        """Check the metrics and the best adapters that a run needs to resume from a checkpoint.

        Raises:
            DamagedFileError: rows up to the checkpoint, or the adapters of the evaluation that was
                the best until then, are missing or damaged.
        """
        rows, damage = undamaged_rows(self.paths.metrics)
        rows = [row for row in rows if row["step"] <= state.progress.step]
        if len(rows) < state.num_metrics_rows:
            number = f"{len(rows)} of {state.num_metrics_rows} rows are left"
            raise damage or damaged(self.paths.metrics, number)
        if self.rule is None or not self.load_best_at_end:
            return
        if (best := self.rule.state_after(rows).step) is not None:
            folder = checkpoint_path(self.paths.best_adapters, best)
            for name in (CONFIG, WEIGHTS):
                verify_file(folder / name)

    def restore(self, rows: Sequence[Row]) -> None:
        """Restore the best evaluation from the metrics rows up to a checkpoint."""
        if self.rule is not None:
            self.state = self.rule.state_after(rows)

    def update(self, row: Row, save: Callable[[Path], object]) -> None:
        """Record an evaluation and save the adapters if it is the best so far.

        Args:
            row: metrics row of the evaluation.
            save: function that saves the current adapters to a folder.

        Raises:
            ConfigError: the evaluation lacks the metric.
        """
        if self.rule is None:
            return
        if self.rule.metric not in row:
            raise ConfigError(
                f"`metric_for_best_model`: an evaluation has no `{self.rule.metric}`, because the "
                "held-out answers are all good or all bad; use `loss`, or hold out other answers"
            )
        before, self.state = self.state, self.rule.update(self.state, row)
        if self.load_best_at_end and self.state.step != before.step:
            with whole_folder(self.folder) as partial:
                save(partial)

    @property
    def should_stop(self) -> bool:
        """Whether the run should stop early now."""
        return self.rule is not None and self.rule.should_stop(self.state)

    @property
    def step(self) -> int | None:
        """Step of the adapters that the run ends with; None means the adapters of the last step."""
        return self.state.step if self.load_best_at_end else None

    def prune(self, rows: Sequence[Row]) -> None:
        """Remove saved adapters that are no longer needed.

        The adapters of the best evaluation are needed, and those of the evaluation that was best
        at a remaining checkpoint, because the run may be resumed from it.

        Args:
            rows: all metrics rows of the run.
        """
        if self.rule is None or not self.load_best_at_end:
            return
        needed = {self.state.step}
        for step in saved_steps(self.paths.checkpoints):
            needed.add(self.rule.state_after(r for r in rows if r["step"] <= step).step)
        for step in set(saved_steps(self.paths.best_adapters)) - needed:
            shutil.rmtree(checkpoint_path(self.paths.best_adapters, step), ignore_errors=True)

    def load_into(self, policy: nn.Module) -> None:
        """Load the best evaluation's adapters into `policy`, if the settings ask for this."""
        if self.step is not None:
            load_adapter_weights(policy, self.folder / WEIGHTS)

    def remove(self) -> None:
        """Remove the saved adapters of all evaluations, which a finished run does not need."""
        shutil.rmtree(self.paths.best_adapters, ignore_errors=True)

    def to_dict(self) -> dict[str, Any] | None:
        """Return the step and the metric of the best evaluation, to be written to `run.json`.

        The result is None if the run ends with the adapters of the last step.
        """
        if self.step is None or self.rule is None:
            return None
        return {"step": self.step, self.rule.metric: self.state.value}

    @property
    def folder(self) -> Path:
        """Folder of the adapters of the best evaluation."""
        assert self.state.step is not None
        return checkpoint_path(self.paths.best_adapters, self.state.step)
