"""Flags of the sampling settings, which several commands share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import click

from mlx_dpo.config.sampling import Sampling

Command = Callable[..., Any]
DEFAULT_SEED = 0  # of commands that compare answers


def sampling_flags(
    *,
    without: Sequence[str] = (),
    many_temperatures: bool = False,
    remarks: Mapping[str, str] | None = None,
    **defaults: Any,
) -> Callable[[Command], Command]:
    """Return a decorator that adds a flag to a command for each field of `Sampling`.

    Args:
        without: Fields that get no flag.
        many_temperatures: Whether `--temperature` may be given several times.
        remarks: Sentences for help texts, by field: why the default of this command differs.
        defaults: Default values for this command that differ from those of `Sampling`.
    """

    def decorate(command: Command) -> Command:
        for field in reversed([field for field in fields(Sampling) if field.name not in without]):
            assert field.default is not MISSING
            setting, default = field.metadata["setting"], defaults.get(field.name, field.default)
            many = many_temperatures and field.name == "temperature"
            remark = (remarks or {}).get(field.name)
            command = click.option(
                "--" + field.name.replace("_", "-"),
                type=setting.type,
                default=[default] if many else default,
                multiple=many,
                show_default=setting.default_text if default is None else True,
                metavar=setting.shown_metavar,
                help=f"{setting.help} {remark}" if remark else setting.help,
            )(command)
        return command

    return decorate


def make_samplings(settings: dict[str, Any]) -> tuple[Sampling, ...]:
    """Return the sampling settings as one `Sampling` for each given temperature.

    Raises:
        ConfigError: a setting is out of its bounds, or has no effect.
    """
    temperature = settings.pop("temperature")
    temperatures = temperature if isinstance(temperature, list | tuple) else [temperature]
    # The default seed is dropped for greedy decoding, where a seed has no effect.
    if settings["seed"] == DEFAULT_SEED:
        return tuple(
            Sampling(**settings | {"temperature": t, "seed": DEFAULT_SEED if t else None})
            for t in temperatures
        )
    return tuple(Sampling(**settings, temperature=t) for t in temperatures)
