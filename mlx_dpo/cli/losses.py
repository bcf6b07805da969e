"""`mlx-dpo losses`: what can be made small, with equations and sources."""

import json
import textwrap
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.config.option import refuse_unknown
from mlx_dpo.losses.catalogue import LEGEND, LOSS_KINDS

if TYPE_CHECKING:
    from mlx_dpo.losses.catalogue import LossKind

WIDTH = 100


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, losses by name.")
def losses(name: str | None, as_json: bool) -> None:
    """List the losses that `train --loss-type` takes, or show the one called NAME.

    Several are summed: `--loss-type sigmoid --loss-type sft`. The settings shown with a loss
    are those that act on it, at the values that they have for it unless they are set.
    """
    if name is not None:
        refuse_unknown(name, LOSS_KINDS, "loss", see="`mlx-dpo losses` lists them")
    shown = {n: kind for n, kind in LOSS_KINDS.items() if name in (None, n)}
    if as_json:
        click.echo(json.dumps({n: as_dict(kind) for n, kind in shown.items()}, ensure_ascii=False))
        return
    for kind in shown.values():
        click.echo(click.style(kind.name, bold=True))
        for line in lines(kind):
            click.echo(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    "))
    click.echo()
    click.echo(textwrap.fill(LEGEND, WIDTH))


def lines(kind: "LossKind") -> list[str]:
    """A loss in lines for a person."""
    settings = ", ".join(f"{name} {value:g}" for name, value in kind.defaults.items())
    acts = [
        *(["margins of the data"] if kind.margins else []),
        *(["f_divergence_type"] if kind.divergences else []),
    ]
    return [
        kind.equation,
        f"use: {kind.use}",
        f"needs: {', '.join(kind.needs) or 'no reference'}",
        f"settings: {settings or 'none'}" + (f"; also {', '.join(acts)}" if acts else ""),
        f"source: {kind.source}",
    ]


def as_dict(kind: "LossKind") -> dict[str, Any]:
    """A loss as plain values."""
    return {
        "equation": kind.equation,
        "source": kind.source,
        "use": kind.use,
        "settings": dict(kind.defaults),
        "needs_reference": kind.needs_reference,
        "labelled": kind.labelled,
        "couples": kind.couples,
        "margins": kind.margins,
        "f_divergence_type": kind.divergences,
        "rewards": kind.rewards,
    }
