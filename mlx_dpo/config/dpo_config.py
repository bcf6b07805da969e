"""A training run as one object: every setting with its default, checked against the others.

The settings are declared once, in `settings/`; the command line, the YAML file, `run.json` and
the table in the README are made from there. Names are TRL's where it has the thing, else
mlx-lm's.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlx_dpo.config.data import PairSettings
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.model import LoRASettings, ModelSettings, ReferenceSettings
from mlx_dpo.config.optimizer import OptimizerSettings
from mlx_dpo.config.option import Option, coerce, refuse_unknown
from mlx_dpo.config.other_trainers import ELSEWHERE
from mlx_dpo.config.training import (
    EvaluationSettings,
    PassLimit,
    ReportingSettings,
    RunSettings,
    TrainingSettings,
)
from mlx_dpo.errors import ConfigError
from mlx_dpo.losses.catalogue import LOSS_KINDS

# What names places of one machine, or is nobody else's business.
OWN = frozenset({"pairs", "valid", "model", "revision", "reference_model", "system", "mix"})


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
    """A training run: what is trained, on which pairs, how, and where it goes."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = coerce(f.name, getattr(self, f.name), f.metadata["option"])
            object.__setattr__(self, f.name, value)
        self._refuse_settings_without_effect()

    def _refuse_settings_without_effect(self) -> None:
        if self.group_size is not None and self.bits is None:
            raise ConfigError("`group_size` has no effect without `bits`")
        if self.valid_fraction is not None and self.valid is not None:
            raise ConfigError("`valid_fraction` has no effect beside `valid`")
        self.refuse_idle_losses()
        self.refuse_idle_adapter_settings()
        self.refuse_idle_reference_settings(
            needed=self.needs_reference, watched=self.metric_for_best_model is not None
        )
        self._refuse_idle_columns()
        self.refuse_idle_pair_settings(labelled=self.labelled)
        self.refuse_idle_optimizer_settings()
        self.refuse_idle_evaluation_settings()
        self.refuse_idle_reporting_settings()
        if self.epochs is not None and self.max_steps is not None:
            raise ConfigError("`epochs` has no effect beside `max_steps`")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ConfigError(
                f"`micro_batch_size` {self.micro_batch_size} is above `batch_size` "
                f"{self.batch_size}"
            )
        if self.max_tokens is not None:
            self._refuse_idle_max_tokens(self.max_tokens)

    def _refuse_idle_columns(self) -> None:
        if self.margin_column is not None and not any(kind.margins for kind in self.loss_kinds):
            those = ", ".join(f"`{k.name}`" for k in LOSS_KINDS.values() if k.margins)
            raise ConfigError(
                f"`margin_column` has no effect with loss_type {', '.join(self.loss_type)}; "
                f"it acts on {those}"
            )
        if self.weight_column is not None and self.couples and not self.labelled:
            raise ConfigError(
                f"`weight_column` is not defined for loss_type {', '.join(self.loss_type)}, whose "
                "terms are of several pairs"
            )
        if self.labelled and self.batch_size < 2:
            raise ConfigError(
                f"`batch_size` must be at least 2 with loss_type `{self.loss_type[0]}`, which "
                "compares the rows of a step with each other, got 1"
            )

    def _refuse_idle_max_tokens(self, tokens: int) -> None:
        pairs = self.micro_batch_size or self.batch_size
        if pairs == 1:
            raise ConfigError("`max_tokens` has no effect with one pair per pass: none is cut")
        # Two whole rows a pair, padded as `preferences.batches` does at most.
        most = 2 * pairs * (self.max_length + self.max_length // 8 + 7)
        if self.micro_batch_size is not None and tokens >= most:
            raise ConfigError(
                f"`max_tokens` {tokens} has no effect beside `micro_batch_size` {pairs} and "
                f"`max_length` {self.max_length}: a pass never has more than {most}"
            )

    @property
    def pass_limit(self) -> PassLimit:
        """The most that one pass of training holds."""
        if self.micro_batch_size is None and self.max_tokens is not None:
            return PassLimit(tokens=self.max_tokens)
        return PassLimit(min(self.micro_batch_size or 2, self.batch_size), self.max_tokens)

    @property
    def unit(self) -> str:
        """What is trained on, in the plural: pairs, or answers that were judged one by one."""
        return "answers" if self.labelled else "pairs"

    @property
    def passes_ahead(self) -> int:
        """How often a step's pairs are scored without gradients before they are with them."""
        return self.couples + self.use_weighting + self.sync_ref_model

    @property
    def held_out_share(self) -> float:
        """Share of the training pairs to hold out."""
        if self.valid is not None:
            return 0.0
        return 0.05 if self.valid_fraction is None else self.valid_fraction

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DPOConfig":
        """Build from parsed keys; ConfigError names one that is unknown or has an unfit value."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name in ELSEWHERE:
                raise ConfigError(f"unknown setting `{name}`; use {ELSEWHERE[name]}")
            refuse_unknown(str(name), known, "setting")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `run.json`; `from_dict` takes them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def shareable(self) -> dict[str, Any]:
        """What was set that changes the result, but for what is of this machine alone."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if (known := options()[name])[1].changes_result
            and not (known[1].path or name in OWN)
            and getattr(self, name) != known[0]
        }

    def withheld(self) -> list[str]:
        """Names of the settings that were made, but that no path, and are not `shareable`."""
        known = options()
        return [
            name
            for name in known
            if name in OWN and not known[name][1].path and getattr(self, name) != known[name][0]
        ]

    def differing(self, other: "DPOConfig") -> str | None:
        """The first setting that would change the result and differs from `other`."""
        for f in fields(self):
            same = getattr(self, f.name) == getattr(other, f.name)
            if (f.metadata["option"].changes_result or f.name in self.decided_by) and not same:
                return f.name
        return None


def options() -> dict[str, tuple[Any, Option]]:
    """Every setting by name, with its default and what it is."""
    return {f.name: (f.default, f.metadata["option"]) for f in fields(DPOConfig)}
