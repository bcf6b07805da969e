"""`mlx-dpo card`: the page that goes with a run's adapter."""

from pathlib import Path

import click


@click.command()
@click.argument("run")
@click.option("--name", metavar="ORG/NAME", default="ORG/NAME", help="What it is to be called.")
@click.option("--base", metavar="ORG/NAME", help="The base on the Hub, if the run names a folder.")
@click.option("--prompts", metavar="FILE", help="Prompts to show answers to, before and after.")
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    help="How many; without --prompts, of the held-out pairs. [default: 3, of public pairs only]",
)
@click.option("--online", is_flag=True, help="Ask the Hub for the base's licence.")
@click.option("--overwrite", is_flag=True, help="Replace a README.md that is there.")
def card(
    run: str,
    name: str,
    base: str | None,
    prompts: str | None,
    samples: int | None,
    online: bool,
    overwrite: bool,
) -> None:
    """Write README.md into RUN: what was trained from what, how well, and how to use it.

    `push` sends it. It is yours to edit.
    """
    from mlx_dpo.hub.run_card import card_of_run, refuse_card, write_card

    folder = Path(run).expanduser()
    if not overwrite:
        refuse_card(folder)  # before the work
    made, notes = card_of_run(run, name, base=base, prompts=prompts, samples=samples, online=online)
    path = write_card(folder, made, overwrite=overwrite)
    for note in notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(f"{path}: read it, mend it, then: mlx-dpo push {run} {name}")
