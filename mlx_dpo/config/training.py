"""Settings of training, evaluation, the run folder and trackers."""

from dataclasses import dataclass
from typing import NamedTuple

from mlx_dpo.config.setting import NoEffect, setting
from mlx_dpo.errors import ConfigError
from mlx_dpo.trackers import TRACKERS
from mlx_dpo.trackers.base import DEFAULT_PROJECT

TRAINING = "Training"


class PassLimit(NamedTuple):
    """Maximum number of pairs and of tokens in one forward pass; None means no limit.

    A pair that exceeds the token limit by itself gets its own forward pass.
    """

    pairs: int | None = None
    tokens: int | None = None

    def scaled(self, factor: int) -> "PassLimit":
        """Return the limit with both maximums multiplied by `factor`."""
        return PassLimit(*(bound and bound * factor for bound in self))


# Values of `scorer` with which passes without gradients are limited by pairs, not by tokens.
SCORED_BY_PAIRS = ("shared", "plain")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of training length, batch sizes and memory."""

    epochs: int | None = setting(
        None,
        "Passes over the pairs.",
        int,
        TRAINING,
        minimum=1,
        default_text="1",
        essential=True,
    )
    max_steps: int | None = setting(
        None,
        "Optimizer steps (instead of `epochs`).",
        int,
        TRAINING,
        minimum=1,
    )
    batch_size: int = setting(
        16,
        "Pairs per optimizer step.",
        int,
        TRAINING,
        minimum=1,
        essential=True,
    )
    micro_batch_size: int | None = setting(
        None,
        "Pairs per pass with gradients; changes memory, not the result.",
        int,
        TRAINING,
        minimum=1,
        default_text="what fits, up to 2 on the CPU (8 if short or with shared texts), 8 on a GPU",
    )
    micro_batch_tokens: int | None = setting(
        None,
        "Tokens per forward pass, with padding; a longer pair gets its own pass.",
        int,
        TRAINING,
        minimum=1,
        default_text="no limit",
    )
    group_by_prompt: bool | None = setting(
        None,
        "Keep the pairs of a prompt together in the order of training, so that a step has them "
        "all where they fit.",
        bool,
        TRAINING,
        default_text="where a prompt has several pairs",
    )
    scorer: str = setting(
        "auto",
        "`trie`: each distinct prefix of the texts of a pass runs once; `shared`: the prompt of "
        "each pair runs once; `plain`: padded rows; `auto`: the first that is verified to be "
        "exact.",
        str,
        TRAINING,
        choices=("auto", "trie", "shared", "plain"),
        metavar="SCORER",
    )
    recompute: bool | None = setting(
        None,
        "Gradient checkpointing: less memory, more time.",
        bool,
        TRAINING,
        default_text="only if memory requires it",
    )
    shard_base: bool | None = setting(
        None,
        "With several ranks: each holds a part of the frozen weights, and gathers them block by "
        "block; for models larger than one machine. Implies `recompute`.",
        bool,
        TRAINING,
        changes_result=False,
        default_text="only if the model does not fit on one rank",
    )
    seed: int = setting(
        42,
        "Random seed of order, adapters, dropout and held-out pairs.",
        int,
        TRAINING,
        minimum=0,
        maximum=2**64 - 1,
        metavar="SEED",
    )


TRAINING_NO_EFFECT: tuple[NoEffect[TrainingSettings], ...] = (
    NoEffect(("epochs",), lambda s: s.max_steps is not None, "together with `max_steps`"),
    NoEffect(
        ("micro_batch_tokens",),
        lambda s: (s.micro_batch_size or s.batch_size) == 1,
        "with one pair per forward pass",
    ),
)


def check_batch_sizes(settings: TrainingSettings) -> None:
    """Raise `ConfigError` if `micro_batch_size` is above `batch_size`."""
    micro, batch = settings.micro_batch_size, settings.batch_size
    if micro is not None and micro > batch:
        raise ConfigError(f"`micro_batch_size` {micro} is above `batch_size` {batch}")


EVALUATION = "Evaluation"
DEFAULT_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of evaluating on held-out pairs, early stopping and choosing the best model."""

    eval_steps: int | None = setting(
        None,
        "Steps between evaluations on held-out pairs.",
        int,
        EVALUATION,
        minimum=1,
        changes_result=False,
        default_text="only at the end",
        essential=True,
    )
    samples: int | None = setting(
        None,
        "Held-out prompts that base and policy answer at each evaluation, in up to 64 tokens each; "
        "0 = none.",
        int,
        EVALUATION,
        minimum=0,
        changes_result=False,
        default_text=str(DEFAULT_SAMPLES),
    )
    metric_for_best_model: str | None = setting(
        None,
        "Metric on held-out pairs that selects the best model, such as `loss` or "
        "`rewards/margins`.",
        str,
        EVALUATION,
        metavar="METRIC",
    )
    load_best_model_at_end: bool = setting(
        False,
        "Finish with the adapters of the best evaluation instead of the last.",
        bool,
        EVALUATION,
    )
    early_stopping_patience: int | None = setting(
        None,
        "Stop after N evaluations without an improvement.",
        int,
        EVALUATION,
        minimum=1,
    )
    early_stopping_threshold: float | None = setting(
        None,
        "Minimum change that counts as an improvement.",
        float,
        EVALUATION,
        minimum=0,
        default_text="0",
    )

    @property
    def sample_count(self) -> int:
        """Maximum number of held-out prompts that are answered at each evaluation."""
        return DEFAULT_SAMPLES if self.samples is None else self.samples

    @property
    def selection_settings(self) -> set[str]:
        """Names of settings that change the result only if the best model is selected.

        The set is `{"eval_steps"}` if `metric_for_best_model` is set, and otherwise empty.
        """
        return {"eval_steps"} if self.metric_for_best_model is not None else set()


EVALUATION_NO_EFFECT: tuple[NoEffect[EvaluationSettings], ...] = (
    NoEffect(
        ("early_stopping_threshold",),
        lambda s: s.early_stopping_patience is None,
        "without `early_stopping_patience`",
    ),
    NoEffect(
        ("metric_for_best_model",),
        lambda s: s.early_stopping_patience is None and not s.load_best_model_at_end,
        "without `early_stopping_patience` or `load_best_model_at_end`",
    ),
    NoEffect(
        ("early_stopping_patience", "load_best_model_at_end"),
        lambda s: s.metric_for_best_model is None,
        "without `metric_for_best_model`",
    ),
    NoEffect(
        ("early_stopping_patience", "load_best_model_at_end"),
        lambda s: s.eval_steps is None,
        "without `eval_steps`",
    ),
)

RUN = "Run"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of the run folder and the console; none of them changes the result."""

    output: str = setting(
        "",
        "Run folder to write.",
        str,
        RUN,
        changes_result=False,
        is_path=True,
        metavar="FOLDER",
        essential=True,
        default_text="runs/MODEL-DATE",
    )
    save_steps: int = setting(
        50,
        "Steps between checkpoints.",
        int,
        RUN,
        minimum=1,
        changes_result=False,
    )
    save_total_limit: int = setting(
        2,
        "Checkpoints to keep.",
        int,
        RUN,
        minimum=1,
        changes_result=False,
    )
    logging_steps: int = setting(
        1,
        "Steps between log lines, if there is no progress bar.",
        int,
        RUN,
        minimum=1,
        changes_result=False,
    )
    caffeinate: bool = setting(
        True,
        "Keep a Mac awake while it trains.",
        bool,
        RUN,
        changes_result=False,
    )


REPORTING = "Reporting"
NO_TRACKER = "none"  # with --resume: stop logging


@dataclass(frozen=True, kw_only=True)
class ReportingSettings:
    """Settings of experiment trackers."""

    report_to: tuple[str, ...] = setting(
        (),
        "Log metrics to this tracker too; repeat it for several. `none` stops logging on resume.",
        str,
        REPORTING,
        is_list=True,
        changes_result=False,
        choices=(*TRACKERS, NO_TRACKER),
        metavar="TRACKER",
    )
    run_name: str | None = setting(
        None,
        "Name of the run in trackers.",
        str,
        REPORTING,
        changes_result=False,
        metavar="NAME",
        default_text="name of the output folder",
    )
    project: str | None = setting(
        None,
        "Project in trackers.",
        str,
        REPORTING,
        changes_result=False,
        default_text=f"the tracker's own setting, else {DEFAULT_PROJECT}",
        metavar="NAME",
    )

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """Names of the trackers that the run logs to."""
        return tuple(name for name in self.report_to if name != NO_TRACKER)

    @property
    def has_run_name(self) -> bool:
        """Whether at least one of the chosen trackers uses `run_name` and `project`."""
        return any(TRACKERS[name].has_run_names for name in self.tracker_names)


REPORTING_NO_EFFECT: tuple[NoEffect[ReportingSettings], ...] = (
    # With `none` the names are allowed: it is given to a resumed run, which may have names.
    NoEffect(("run_name", "project"), lambda s: not s.report_to, "without `report_to`"),
    NoEffect(
        ("run_name", "project"),
        lambda s: bool(s.tracker_names) and not s.has_run_name,
        lambda s: (
            f"with report_to {' and '.join(s.tracker_names)} alone, which names a run after its "
            "folder"
        ),
    ),
)


def check_reporting_settings(settings: ReportingSettings) -> None:
    """Raise `ConfigError` for a repeated or contradictory `report_to`, or for an empty name."""
    for tracker in settings.report_to:
        if settings.report_to.count(tracker) > 1:
            raise ConfigError(f"`report_to` contains {tracker} twice")
    if NO_TRACKER in settings.report_to and settings.tracker_names:
        raise ConfigError(f"`report_to` {NO_TRACKER} contradicts {settings.tracker_names[0]}")
    for name, value in (("run_name", settings.run_name), ("project", settings.project)):
        if value is not None and not value.strip():
            raise ConfigError(f"`{name}` is empty; give a name, or leave it out")
