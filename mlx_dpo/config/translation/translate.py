"""Translate the configuration of another trainer into settings of mlx-dpo, as commented YAML."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from mlx_dpo.config.dpo_config import DPOConfig, get_settings
from mlx_dpo.config.other_trainers import EQUIVALENTS
from mlx_dpo.config.setting import parse_value
from mlx_dpo.config.translation.converters import Converted, sum_with_sft
from mlx_dpo.config.translation.trainers import CONVERTERS, MARKS, OTHER_DEFAULTS
from mlx_dpo.errors import ConfigError
from mlx_dpo.terminal_text import escape_line

MAX_SHOWN = 60  # characters of a value in a comment
# Names of settings whose value is a secret, and the form of tokens of the Hub.
SECRET_NAME = re.compile(r"(api_?key|token|secret|password|passwd)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf|api_org)_\w{8,}")
NOT_SHOWN = "(not shown)"


@dataclass
class Translation:
    """Settings of mlx-dpo, remarks on them, and what was left out and why."""

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # on a setting, by its name here
    left_out: dict[str, str] = field(default_factory=dict)  # `name: value` there, and the reason

    def to_yaml(self) -> str:
        """Return the settings as YAML, with a comment for each thing that differs."""
        lines = [f"# Translated from a configuration of {self.trainer}."]
        for name, value in self.settings.items():
            if name in self.notes:
                lines.append(f"# {name}: {self.notes[name]}")
            lines.append(yaml.safe_dump({name: value}, allow_unicode=True).rstrip())
        missing = [name for name in ("model", "pairs") if name not in self.settings]
        if missing:
            lines += ["", f"# Not in the file; `mlx-dpo train` asks for it: {', '.join(missing)}"]
        lines += ["", f"# {self.trainer}'s own defaults are not copied: "
                  f"{OTHER_DEFAULTS[self.trainer]}."]  # fmt: skip
        if self.left_out:
            lines += ["", "# Left out:"]
            lines += [f"#   {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines) + "\n"


def recognize_trainer(values: Mapping[str, Any]) -> str:
    """Return the name of the trainer whose settings these are.

    Raises:
        ConfigError: no name belongs to a known trainer.
    """
    counts = {trainer: len(marks & values.keys()) for trainer, marks in MARKS.items()}
    trainer = max(counts, key=lambda name: counts[name])
    if counts[trainer]:
        return trainer
    if values and values.keys() <= get_settings().keys():
        raise ConfigError("every name is a setting of mlx-dpo already; use it with --config")
    raise ConfigError(f"no setting of {', '.join(MARKS)} was found; translate it by hand")


def translate(values: Mapping[str, Any]) -> Translation:
    """Translate the settings of another trainer; empty ones are ignored.

    Settings that `DPOConfig` refuses together are left out, with its reason.

    Raises:
        ConfigError: no name belongs to a known trainer.
    """
    translation = Translation(recognize_trainer(values))
    given = {name: value for name, value in values.items() if value not in (None, "", [], {})}
    converters = CONVERTERS[translation.trainer]
    # A sum of losses replaces the loss, whatever their order in the file.
    for name in sorted(given, key=lambda name: converters.get(name) is sum_with_sft):
        _add_setting(translation, name, given[name], given)
    _drop_refused(translation)
    return translation


def _add_setting(translation: Translation, name: str, value: Any, given: Mapping[str, Any]) -> None:
    """Add our settings for one of the other trainer's, or the reason why there are none."""
    known = get_settings()
    shown = _show(name, value)
    converter = CONVERTERS[translation.trainer].get(name)
    if converter is None and name not in known:
        translation.left_out[shown] = EQUIVALENTS.get(name, "unknown to mlx-dpo")
        return
    try:
        converted = converter(value, given) if converter else Converted({name: value})
        parsed = {
            setting: parse_value(setting, new, known[setting])
            for setting, new in converted.settings.items()
        }
    except (ConfigError, TypeError, ValueError) as error:
        translation.left_out[shown] = escape_line(str(error))
        return
    if not parsed and converted.note:
        translation.left_out[shown] = converted.note
    for setting, new in parsed.items():
        translation.settings[setting] = list(new) if isinstance(new, tuple) else new
        if converted.note and setting == next(iter(parsed)):
            translation.notes[setting] = converted.note


def _drop_refused(translation: Translation) -> None:
    """Leave out settings that contradict others, until `DPOConfig` accepts the rest."""
    while translation.settings:
        try:
            DPOConfig.from_dict(dict(translation.settings))
        except ConfigError as error:
            message = escape_line(str(error))
            names = [n for n in re.findall(r"`(\w+)`", message) if n in translation.settings]
            if not names:
                raise
            value = translation.settings.pop(names[0])
            translation.left_out[_show(names[0], value)] = message
        else:
            return


def _show(name: str, value: Any) -> str:
    """Return `name: value` on one line, shortened, without secrets."""
    text = escape_line(f"{name}: {_without_secrets(name, value)}")
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _without_secrets(name: str, value: Any) -> Any:
    """Return the value of a setting with secrets in it replaced, also in lists and mappings."""
    if isinstance(value, Mapping):
        return {key: _without_secrets(str(key), item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(name, item) for item in value]
    if isinstance(value, str) and SECRET_NAME.search(name):
        return NOT_SHOWN
    return SECRET_VALUE.sub(NOT_SHOWN, value) if isinstance(value, str) else value
