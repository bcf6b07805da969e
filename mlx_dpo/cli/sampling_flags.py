"""What `collect`, `winrate` and `loop` share: flags for sampling and for whoever judges."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import click

from mlx_dpo.config.sampling import Sampling

Command = Callable[..., Any]
SEED = 0


def judge_flags(command: Command) -> Command:
    """Add `--reward`, `--judge` and `--rubric`."""
    for decorate in (
        click.option("--rubric", metavar="FILE", help="What the judge is told, in place of ours."),
        click.option("--judge", metavar="MODEL", help="A model that judges; it reads both orders."),
        click.option(
            "--reward",
            metavar="FILE:FUNCTION",
            help="A function of (prompt, answer) that returns a number; its file is run.",
        ),
    ):
        command = decorate(command)
    return command


def answer_flags(*, temperature: float, several: bool = False) -> Callable[[Command], Command]:
    """Add a flag for each field of `Sampling`; with `several`, temperatures may be repeated."""

    def decorate(command: Command) -> Command:
        for f in reversed(fields(Sampling)):
            assert f.default is not MISSING
            setting, default = f.metadata["setting"], f.default
            help, many = setting.help, False
            if f.name == "temperature":
                default, many = temperature, several
                if several:
                    help += f" Repeat it for answers of several. [default: {temperature}]"
            elif f.name == "seed":
                default, help = SEED, "Seed of the choice."
            command = click.option(
                "--" + f.name.replace("_", "-"),
                type=setting.type,
                default=[default] if many else default,
                multiple=many,
                show_default=default is not None and not many,
                help=help,
            )(command)
        return command

    return decorate


def samplings(settings: dict[str, Any]) -> tuple[Sampling, ...]:
    """One for each temperature.

    Raises:
        ConfigError: a setting is out of its bounds, or has no effect.
    """
    given = settings.pop("temperature")
    temperatures = list(given) if isinstance(given, list | tuple) else [given]
    # The seed that is there unasked has no effect where the likeliest token is always taken.
    if settings["seed"] == SEED:
        return tuple(
            Sampling(**settings | {"temperature": t, "seed": SEED if t else None})
            for t in temperatures
        )
    return tuple(Sampling(**settings, temperature=t) for t in temperatures)
