"""`DPOConfig`: all settings of a training run, checked against each other.

Every setting is declared once, in one of the modules of `config/`; flags, YAML keys, `run.json`
and docs/settings.md are made from the declarations. Names are TRL's if TRL has the
setting, else mlx-lm's.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_dpo.config.data import DATA_NO_EFFECT, PairSettings, check_pair_settings
from mlx_dpo.config.loss import LOSS_NO_EFFECT, LossSettings, check_losses
from mlx_dpo.config.model import (
    LORA_NO_EFFECT,
    MODEL_NO_EFFECT,
    REFERENCE_NO_EFFECT,
    LoRASettings,
    ModelSettings,
    ReferenceSettings,
    check_reference_settings,
)
from mlx_dpo.config.optimizer import (
    OPTIMIZER_NO_EFFECT,
    OptimizerSettings,
    check_optimizer_settings,
)
from mlx_dpo.config.other_trainers import EARLIER_NAMES, resolve_loss_name, suggest
from mlx_dpo.config.setting import NoEffect, Setting, check_effects, cut, parse_value
from mlx_dpo.config.training import (
    EVALUATION_NO_EFFECT,
    REPORTING_NO_EFFECT,
    TRAINING_NO_EFFECT,
    EvaluationSettings,
    PassLimit,
    ReportingSettings,
    RunSettings,
    TrainingSettings,
    check_batch_sizes,
    check_reporting_settings,
)
from mlx_dpo.errors import ConfigError
from mlx_dpo.losses.catalogue import LOSSES

# Settings that name places of this machine or are private.
PRIVATE_SETTINGS = frozenset(
    {"pairs", "valid", "model", "revision", "reference_model", "system", "mix"}
)

# Settings that a run chooses if they are not set, when model and pairs are known.
CHOSEN_BY_RUN = ("learning_rate", "max_length", "group_by_prompt")

# LoRA settings that a run has of its own if it continues another adapter.
FREE_LORA_SETTINGS = ("lora_dropout", "start_adapter")

IN_MEMORY = {"pairs": "train_dataset", "valid": "eval_dataset"}  # arguments of DPOTrainer


def _check_names(name: str, value: Any, argument: str) -> None:
    """Raise `ConfigError` if a setting that names pairs was given the pairs themselves."""
    items = value if isinstance(value, list | tuple) else [value]
    if not all(item is None or isinstance(item, str | Path) for item in items):
        raise ConfigError(
            f"`{name}` names files and datasets, got {cut(repr(value))}; pass rows in memory as "
            f"`{argument}` of DPOTrainer"
        )


@dataclass(frozen=True, kw_only=True)
class DPOConfig(  # fields come in the order of the bases, last one first
    ReportingSettings,
    RunSettings,
    EvaluationSettings,
    TrainingSettings,
    OptimizerSettings,
    LoRASettings,
    ReferenceSettings,
    LossSettings,
    PairSettings,
    ModelSettings,
):
    """All settings of a training run."""

    if not TYPE_CHECKING:  # type checkers use the signature of `__init__`

        def __new__(cls, **values: Any) -> "DPOConfig":
            """Raise `ConfigError`, with a suggestion, if a keyword is not the name of a setting."""
            check_setting_names(values)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, argument in IN_MEMORY.items():
            _check_names(name, getattr(self, name), argument)
        for f in fields(self):
            value = parse_value(f.name, getattr(self, f.name), f.metadata["setting"])
            object.__setattr__(self, f.name, value)
        object.__setattr__(self, "loss_type", tuple(map(resolve_loss_name, self.loss_type)))
        check_losses(self)
        check_effects(self, NO_EFFECT)
        check_reference_settings(self)
        check_pair_settings(self, labelled=self.labelled, supervised=self.supervised)
        check_optimizer_settings(self)
        check_batch_sizes(self)
        check_reporting_settings(self)
        self._check_combinations()
        self._check_best_metric()

    def _check_best_metric(self) -> None:
        """Raise `ConfigError` if evaluations of the run lack the metric of the best model."""
        name = (self.metric_for_best_model or "").removeprefix("eval_")
        is_of_pairs = name.startswith("rewards/") or name == "logps/rejected"
        if self.supervised and is_of_pairs:
            raise ConfigError(
                f"`metric_for_best_model` {name} is a metric of preferences; with loss_type `sft` "
                "use loss or mean_token_accuracy"
            )
        if name == "mean_token_accuracy" and not self.supervised:
            raise ConfigError(
                "`metric_for_best_model` mean_token_accuracy is a metric of instruction tuning "
                "(--loss-type sft alone); use loss or rewards/accuracies"
            )

    def _check_combinations(self) -> None:
        losses = ", ".join(self.loss_type)
        couples = any(loss.uses_whole_batch and not loss.listwise for loss in self.losses)
        if self.weight_column is not None and couples and not self.labelled:
            raise ConfigError(
                f"`weight_column` is not defined for loss_type {losses}, whose terms compare "
                "several pairs"
            )
        if self.labelled and self.batch_size < 2:
            raise ConfigError(
                f"`batch_size` must be at least 2 with loss_type `{losses}`, which compares the "
                "rows of a step with each other; got 1"
            )
        self._check_ranked_data()
        if self.shard_base and self.fine_tune_type == "full":
            raise ConfigError(
                "`shard_base` shards frozen weights, but fine_tune_type `full` trains them; use "
                "`lora` or `dora`"
            )
        if self.shard_base and (self.recompute is False or self.samples):
            name = "`recompute` false" if self.recompute is False else "`samples`"
            raise ConfigError(
                f"{name} is not possible with `shard_base`, which gathers the weights of a block "
                "each time that it runs; leave it out"
            )
        if self.sync_ref_model and self.metric_for_best_model is not None:
            raise ConfigError(
                "`metric_for_best_model` compares evaluations, but `sync_ref_model` changes the "
                "reference between them; leave out one of them"
            )

    def _check_ranked_data(self) -> None:
        """Raise `ConfigError` for data settings that leave a loss without lists."""
        losses = ", ".join(f"`{name}`" for name in self.loss_type)
        if not self.listwise:
            return
        if self.ranked not in (None, "all"):
            raise ConfigError(
                f"`ranked` {self.ranked} makes no lists; loss_type {losses} needs `ranked` all"
            )
        if self.group_by_prompt is False:
            raise ConfigError(
                f"`group_by_prompt` false would divide lists between steps; loss_type {losses} "
                "needs whole lists; leave it out"
            )
        if self.pair_labelled:
            raise ConfigError(
                f"`pair_labelled` makes pairs, not lists; loss_type {losses} needs rows with rated "
                "`completions`"
            )
        if any(weight % 1 for weight in self.mix):
            raise ConfigError(
                f"`mix` must be whole numbers with loss_type {losses}: a fraction draws single "
                f"pairs of a list, got {', '.join(f'{weight:g}' for weight in self.mix)}"
            )

    @property
    def pairing(self) -> str | None:
        """Pairs to make of a list of rated completions; None: the default of ranked rows."""
        return "all" if self.listwise else self.ranked

    @property
    def _most_tokens_per_pass(self) -> int:
        """Upper bound on the number of tokens in one forward pass, including padding."""
        pairs = self.micro_batch_size or self.batch_size
        return 2 * pairs * (self.length_limit + self.length_limit // 8 + 7)

    @property
    def pass_limit(self) -> PassLimit:
        """Maximum number of pairs and of tokens in one forward pass of training."""
        if self.micro_batch_size is None and self.micro_batch_tokens is not None:
            return PassLimit(tokens=self.micro_batch_tokens)
        return PassLimit(min(self.micro_batch_size or 2, self.batch_size), self.micro_batch_tokens)

    @property
    def extra_forward_passes(self) -> int:
        """Number of no-gradient forward passes that precede the gradient pass of each step."""
        return self.uses_whole_batch + self.use_weighting + self.sync_ref_model

    @property
    def held_out_fraction(self) -> float:
        """Fraction of the training pairs to hold out; 0 if `valid` is set."""
        if self.valid is not None:
            return 0.0
        return 0.05 if self.valid_fraction is None else self.valid_fraction

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DPOConfig":
        """Build the settings from a dictionary, such as a parsed YAML file.

        Raises:
            ConfigError: a key is unknown, or its value is not valid.
        """
        check_setting_names(values)  # keys of a file need not be strings
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-compatible dictionary; `from_dict` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def with_recorded_choices(self, recorded: Mapping[str, Any]) -> "DPOConfig":
        """Return a copy in which a resumed run keeps what the run chose when it began.

        Args:
            recorded: settings of the run to be resumed, by name.
        """
        names = [name for name in CHOSEN_BY_RUN if getattr(self, name) is None]
        return self.from_dict(self.to_dict() | {name: recorded.get(name) for name in names})

    def get_public_settings(self) -> dict[str, Any]:
        """Return the settings to publish, for instance in a model card.

        These are the settings that change the result of the training, differ from their
        defaults and are not private. Paths are private.
        """
        values = self.to_dict()
        return {
            name: values[name]
            for name, setting in get_settings().items()
            if setting.changes_result
            and not (setting.is_path or name in PRIVATE_SETTINGS)
            and getattr(self, name) != setting.default
        }

    def list_private_settings(self) -> list[str]:
        """Return the names of private settings (except paths) that differ from their defaults."""
        return [
            name
            for name, setting in get_settings().items()
            if name in PRIVATE_SETTINGS
            and not setting.is_path
            and getattr(self, name) != setting.default
        ]

    def find_difference(self, other: "DPOConfig") -> str | None:
        """Return the name of the first setting that prevents resuming a run, or None.

        Such a setting differs from its value in `other`, the settings of the other run, and
        changes the result of the training.
        """
        for name, setting in get_settings().items():
            changes_result = setting.changes_result or name in self.selection_settings
            if changes_result and getattr(self, name) != getattr(other, name):
                return name
        return None

    def starting_from(self, folder: str) -> "DPOConfig":
        """Return the settings that continue the adapter in `folder`, with its LoRA settings.

        Raises:
            ConfigError: the settings contradict `start_adapter`.
        """
        known = get_settings()
        inherited = [f.name for f in fields(LoRASettings) if f.name not in FREE_LORA_SETTINGS]
        defaults: dict[str, Any] = {name: known[name].default for name in inherited}
        return replace(self, **defaults, start_adapter=folder)


def check_setting_names(values: Mapping[str, Any]) -> None:
    """Raise `ConfigError`, with a suggestion for each, if keys of `values` are not settings."""
    known = [f.name for f in fields(DPOConfig)]
    advice = {str(name): suggest(str(name), known) for name in values if name not in known}
    if len(advice) == 1:
        [(name, hint)] = advice.items()
        raise ConfigError(f"unknown setting `{cut(name)}`" + (f"; {hint}" if hint else ""))
    if advice:
        names = [f"`{cut(name)}`" + (f" ({hint})" if hint else "") for name, hint in advice.items()]
        raise ConfigError(f"unknown settings: {', '.join(names)}")


def rename_earlier_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings with the names of earlier versions replaced by the current ones."""
    return {EARLIER_NAMES.get(name, name): value for name, value in values.items()}


def get_settings() -> dict[str, Setting]:
    """Return a dictionary from the name of every setting of `DPOConfig` to its declaration."""
    return {f.name: f.metadata["setting"] for f in fields(DPOConfig)}


NO_EFFECT: tuple[NoEffect[DPOConfig], ...] = (
    *MODEL_NO_EFFECT,
    *DATA_NO_EFFECT,
    *LOSS_NO_EFFECT,
    *LORA_NO_EFFECT,
    *REFERENCE_NO_EFFECT,
    *OPTIMIZER_NO_EFFECT,
    *TRAINING_NO_EFFECT,
    *EVALUATION_NO_EFFECT,
    *REPORTING_NO_EFFECT,
    NoEffect(
        ("reference_model", "sync_ref_model"),
        lambda s: not s.needs_reference,
        lambda s: f"with the reference-free loss_type {', '.join(s.loss_type)}",
    ),
    NoEffect(
        ("margin_column",),
        lambda s: not any(loss.uses_margins for loss in s.losses),
        lambda s: (
            f"with loss_type {', '.join(s.loss_type)}; it acts on "
            + ", ".join(f"`{loss.name}`" for loss in LOSSES.values() if loss.uses_margins)
        ),
    ),
    NoEffect(
        ("micro_batch_tokens",),
        lambda s: (
            s.micro_batch_size is not None
            and (s.micro_batch_tokens or 0) >= s._most_tokens_per_pass
        ),
        lambda s: (
            f"together with `micro_batch_size` {s.micro_batch_size} and `max_length` "
            f"{s.length_limit}: a forward pass never has more than {s._most_tokens_per_pass} tokens"
        ),
    ),
)
