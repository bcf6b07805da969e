"""The settings of each stage, made from the settings of the command."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlx_dpo.config.dpo_config import DPOConfig, check_setting_names
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.model import ReferenceSettings
from mlx_dpo.errors import ConfigError

SFT, DPO = "sft", "dpo"
# Settings of the last stage alone. The first stage has its own learning rate and length.
LAST_ONLY = frozenset(
    {
        *(f.name for f in fields(LossSettings)),
        *(f.name for f in fields(ReferenceSettings)),
        "learning_rate", "epochs", "max_steps",
        "pair_labelled", "ranked", "margin_column", "weight_column",
        "metric_for_best_model", "load_best_model_at_end", "early_stopping_patience",
        "early_stopping_threshold",
    }
)  # fmt: skip
# Settings of the rows of the last stage, which do not fit other rows.
OF_PAIRS = frozenset({"pairs", "valid", "mix", "split", "schema", "column"})


@dataclass(frozen=True)
class Stage:
    """A stage: its name, which is that of its folder, and the settings of its run."""

    name: str
    config: DPOConfig


@dataclass(frozen=True)
class StageSettings:
    """The settings of training in stages, as given.

    A setting is for both stages, except for those in `LAST_ONLY`, which are for the last one. The
    last stage continues the adapter of the first, with its LoRA settings.

    Attributes:
        names: `sft` and `dpo`, or instead of `dpo` the name of another loss of preferences.
        values: the settings, `model`, `pairs` and `output` among them.
        first: settings of the first stage that replace those in `values`.
    """

    names: tuple[str, ...]
    values: Mapping[str, Any]
    first: Mapping[str, Any]

    @property
    def output(self) -> Path:
        """The folder that contains the folders of the stages."""
        return Path(str(self.values["output"])).expanduser()

    def stages(self) -> tuple[Stage, Stage]:
        """Return both stages.

        Raises:
            ConfigError: the names are not those of two such stages, or settings are not valid.
        """
        name = _last_name(self.names)
        last = self._last_loss(name)
        folders = {stage: str(self.output / stage) for stage in (SFT, name)}
        others = {key: v for key, v in self.values.items() if key not in LAST_ONLY}
        if "pairs" in self.first:
            others = {key: v for key, v in others.items() if key not in OF_PAIRS}
        for key in ("loss_type", "output", "model"):
            if key in self.first:
                raise ConfigError(f"`{key}` cannot be set for the stage `{SFT}`")
        first = others | dict(self.first) | {"loss_type": (SFT,), "output": folders[SFT]}
        try:
            check_setting_names(self.first)
            tuning = DPOConfig.from_dict(first)
        except ConfigError as error:
            raise ConfigError(f"stage `{SFT}`: {error}") from error
        values = dict(self.values) | last | {"output": folders[name]}
        for first_only in ("start_adapter", "assistant_turns"):
            values.pop(first_only, None)
        preferences = DPOConfig.from_dict(values).starting_from(folders[SFT])
        if preferences.supervised:
            raise ConfigError(f"`stages` end with a loss of preferences, not with `{SFT}` again")
        return self._stage(SFT, tuning), self._stage(name, preferences)

    def _stage(self, name: str, config: DPOConfig) -> Stage:
        """Return a stage; trackers show the name of the run with that of the stage."""
        if config.has_run_name:
            whole = config.run_name or self.output.resolve().name
            config = replace(config, run_name=f"{whole}-{name}")
        return Stage(name, config)

    def _last_loss(self, name: str) -> dict[str, Any]:
        """Return the setting `loss_type` of the last stage, if its name is that of a loss."""
        if name == DPO:
            return {}
        if self.values.get("loss_type"):
            raise ConfigError(f"`loss_type` has no effect with the stage `{name}`, which is a loss")
        return {"loss_type": (name,)}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"stages": list(self.names), "settings": dict(self.values), "sft": dict(self.first)}


def _last_name(names: Sequence[str]) -> str:
    if len(names) != 2 or names[0] != SFT:
        found = ",".join(names) or "nothing"
        raise ConfigError(
            f"`stages` must be sft,dpo or sft and another loss, such as sft,simpo, got {found}"
        )
    return names[1]
