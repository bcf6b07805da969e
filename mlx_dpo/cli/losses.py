"""`mlx-dpo losses`: the available losses, with equations and sources."""

import textwrap
from typing import Any

import click

from mlx_dpo.cli.command import Command
from mlx_dpo.cli.output import echo, echo_json
from mlx_dpo.config.other_trainers import check_loss_name, resolve_loss_name
from mlx_dpo.losses.catalogue import LEGEND, LOSSES
from mlx_dpo.losses.loss import Loss

WIDTH = 100


@click.command(cls=Command, examples=("mlx-dpo losses", "mlx-dpo losses simpo"))
@click.argument("name", required=False, metavar="[LOSS]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, losses by name.")
def losses(name: str | None, as_json: bool) -> None:
    """List the losses that `train --loss-type` takes, or show LOSS.

    Repeat the flag to sum several: `--loss-type sigmoid --loss-type sft`. The settings shown with a
    loss are those that it reads, with their default values for this loss.
    """
    if name is not None:
        name = resolve_loss_name(name)
        check_loss_name(name)
    listed = [loss for loss in LOSSES.values() if name in (None, loss.name)]
    if as_json:
        records = {loss.name: to_dict(loss) for loss in listed}
        echo_json(records)
        return
    for loss in listed:
        echo(loss.name, bold=True)
        for line in describe(loss):
            echo(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    "))
    echo()
    echo(textwrap.fill(LEGEND, WIDTH))


def describe(loss: Loss) -> list[str]:
    """Return the description of a loss as lines of text: equation, use, settings and source."""
    settings = ", ".join(f"{name} {value:g}" for name, value in loss.defaults.items())
    also = [
        *(["margins of the data"] if loss.uses_margins else []),
        *(["f_divergence_type"] if loss.uses_divergence else []),
    ]
    return [
        loss.equation,
        f"use: {loss.use}",
        f"needs: {', '.join(loss.needs) or 'no reference'}",
        f"settings: {settings or 'none'}" + (f"; also {', '.join(also)}" if also else ""),
        f"source: {loss.source}",
    ]


def to_dict(loss: Loss) -> dict[str, Any]:
    """Return the description of a loss as a JSON-compatible dictionary for `--json`."""
    return {
        "equation": loss.equation,
        "source": loss.source,
        "use": loss.use,
        "settings": dict(loss.defaults),
        "needs_reference": loss.needs_reference,
        "labelled": loss.labelled,
        "couples": loss.uses_whole_batch,
        "margins": loss.uses_margins,
        "f_divergence_type": loss.uses_divergence,
        "rewards": loss.reward,
    }
