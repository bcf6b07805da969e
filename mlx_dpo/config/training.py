"""How long it is trained, in which batches, and what a pass may cost."""

from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from mlx_dpo.config.option import option
from mlx_dpo.errors import ConfigError
from mlx_dpo.trackers import TRACKERS
from mlx_dpo.trackers.base import DEFAULT_PROJECT

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


EVALUATION = "Evaluation"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """When held-out pairs are asked about, and what follows from it."""

    eval_steps: int | None = option(
        None,
        "Steps between evaluations on held-out pairs. [default: at the end]",
        int,
        EVALUATION,
        low=1,
        changes_result=False,
    )
    metric_for_best_model: str | None = option(
        None, "Metric on held-out pairs to go by (`loss`, `rewards/margins`).", str, EVALUATION
    )
    load_best_model_at_end: bool = option(
        False, "Finish with the adapters of the best evaluation, not the last.", bool, EVALUATION
    )
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without an improvement.", int, EVALUATION, low=1
    )
    early_stopping_threshold: float | None = option(
        None, "What is more than this is an improvement. [default: 0]", float, EVALUATION, low=0
    )

    def refuse_idle_evaluation_settings(self) -> None:
        """Settings that nothing follows from.

        Raises:
            ConfigError: names the first of them, and what it lacks.
        """
        stops, metric = self.early_stopping_patience is not None, self.metric_for_best_model
        if self.early_stopping_threshold is not None and not stops:
            _lacks("early_stopping_threshold", "`early_stopping_patience`")
        keeps = self.load_best_model_at_end
        wanted = {"early_stopping_patience": stops, "load_best_model_at_end": keeps}
        acting = [name for name, acts in wanted.items() if acts]
        if metric is not None and not acting:
            _lacks("metric_for_best_model", " or ".join(f"`{name}`" for name in wanted))
        for name in acting:
            if metric is None:
                _lacks(name, "`metric_for_best_model`")
            if self.eval_steps is None:
                _lacks(name, "`eval_steps`")

    @property
    def decided_by(self) -> set[str]:
        """Settings that change the result only because something is watched."""
        return {"eval_steps"} if self.metric_for_best_model is not None else set()


def _lacks(name: str, what: str) -> NoReturn:
    raise ConfigError(f"`{name}` has no effect without {what}")


RUN = "Run"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run writes and says; nothing here changes its result."""

    output: str = option("", "Run folder to write.", str, RUN, changes_result=False, path=True)
    save_steps: int = option(
        50, "Steps between checkpoints.", int, RUN, low=1, changes_result=False
    )
    save_total_limit: int = option(2, "Checkpoints to keep.", int, RUN, low=1, changes_result=False)
    logging_steps: int = option(
        1, "Steps between lines, where there is no live bar.", int, RUN, low=1, changes_result=False
    )
    caffeinate: bool = option(
        True, "Keep a Mac awake while it trains.", bool, RUN, changes_result=False
    )


REPORTING = "Reporting"
NO_TRACKER = "none"  # with --resume: stop logging


@dataclass(frozen=True, kw_only=True)
class ReportingSettings:
    """Trackers that a run logs to, and its name and project there."""

    report_to: tuple[str, ...] = option(
        (), "Log metrics to this tracker too; may be repeated. `none` stops logging on resume.",
        str, REPORTING, many=True, changes_result=False,
        choices=(*TRACKERS, NO_TRACKER),
    )  # fmt: skip
    run_name: str | None = option(
        None, "Name of the run in trackers. [default: name of the output folder]",
        str, REPORTING, changes_result=False,
    )  # fmt: skip
    project: str | None = option(
        None, f"Project in trackers. [default: the tracker's own setting, else {DEFAULT_PROJECT}]",
        str, REPORTING, changes_result=False,
    )  # fmt: skip

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """Names of the trackers that the run logs to."""
        return tuple(name for name in self.report_to if name != NO_TRACKER)

    @property
    def has_run_name(self) -> bool:
        """Whether `run_name` and `project` have an effect on one of the trackers."""
        return any(TRACKERS[name].has_run_names for name in self.tracker_names)

    def refuse_idle_reporting_settings(self) -> None:
        """Check that no tracker is named twice and that `run_name` and `project` have an effect.

        Raises:
            ConfigError: names the first setting without effect, and why it has none.
        """
        for name in self.report_to:
            if self.report_to.count(name) > 1:
                raise ConfigError(f"`report_to` names {name} twice")
        if NO_TRACKER in self.report_to and self.tracker_names:
            raise ConfigError(f"`report_to` {NO_TRACKER} contradicts {self.tracker_names[0]}")
        for setting in ("run_name", "project"):
            if (name := getattr(self, setting)) is not None:
                self._refuse_idle_name(setting, name)

    def _refuse_idle_name(self, setting: str, name: str) -> None:
        if not name.strip():
            raise ConfigError(f"`{setting}` is empty; give a name, or leave it out")
        if not self.report_to:  # `none` is given to a resumed run, which may have a name
            raise ConfigError(f"`{setting}` has no effect without `report_to`")
        if self.tracker_names and not self.has_run_name:
            names = " and ".join(self.tracker_names)
            raise ConfigError(
                f"`{setting}` has no effect with report_to {names} alone, which names a run after "
                "its folder"
            )
