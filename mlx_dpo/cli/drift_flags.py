"""The flags of `mlx-dpo eval --drift`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FOLDER
from mlx_dpo.cli.judge_flags import RESPONDER, connection_flags, make_connection
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.evaluation.measurements.measurement import Measure

NEEDS_DRIFT = ("drift_prompts", "drift_tokens", "judge")


def drift_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--drift` and its settings to a command."""
    for decorate in (
        connection_flags,
        click.option(
            "--judge",
            type=FOLDER,
            metavar=RESPONDER,
            help="With --drift: this run, model or address also judges which answers are refusals.",
        ),
        click.option(
            "--drift-tokens",
            type=click.IntRange(min=8),
            metavar="N",
            help="Maximum number of tokens per answer of --drift.",
            show_default="128",
        ),
        click.option(
            "--drift-prompts",
            type=click.IntRange(min=1),
            metavar="N",
            help="Number of held-out prompts to which --drift samples answers.",
            show_default="64",
        ),
        click.option(
            "--drift",
            is_flag=True,
            help="Report how far training moved the model: KL divergence, perplexity, length and "
            "repetition of its answers, refusals of prompts that it must answer or must refuse.",
        ),
    ):
        command = decorate(command)
    return command


def prepare_drift_of(
    flags: dict[str, Any], pairs: str | None, bad_pairs: str | None
) -> "Measure | None":
    """Return the drift report that the flags ask for; None without `--drift`.

    The flags of the connection are taken out of `flags`.

    Raises:
        ConfigError: a flag has no effect, or the judge cannot be used.
    """
    connection = make_connection(flags, flags["judge"])
    for name in NEEDS_DRIFT:
        if flags[name] is not None and not flags["drift"]:
            raise ConfigError(f"`--{name.replace('_', '-')}` has no effect without --drift")
    if not flags["drift"]:
        return None
    from mlx_dpo.evaluation.drift.measure import DriftSettings, prepare_drift

    numbers = {"prompts": flags["drift_prompts"], "max_tokens": flags["drift_tokens"]}
    given = {name: value for name, value in numbers.items() if value is not None}
    return prepare_drift(
        DriftSettings(
            pairs=pairs, bad_pairs=bad_pairs, judge=flags["judge"], connection=connection, **given
        )
    )
