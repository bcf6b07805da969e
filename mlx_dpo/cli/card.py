"""`mlx-dpo card`: write the model card of a run."""

import shlex

import click

from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.cli.output import echo


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo card run --name me/my-adapter",
        "mlx-dpo card run --name me/my-adapter --prompts prompts.txt --overwrite",
    ),
    renamed={"--base": "use --base-model ORG/NAME"},
)
@click.argument("run", type=FOLDER)
@click.option(
    "--name", metavar="ORG/NAME", default="ORG/NAME", help="Hub repository of the adapter."
)
@click.option(
    "--base-model", "base", metavar="ORG/NAME", help="Hub id of the base model, if it is a folder."
)
@click.option(
    "--prompts", type=FILE, metavar="FILE", help="Prompts for samples before and after training."
)
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    help="Number of samples, of --prompts or of the held-out prompts.",
    show_default="0; with --prompts 3",
)
@click.option(
    "--online",
    is_flag=True,
    help="Ask the Hub for the license of the base model, and which datasets are public.",
)
@click.option(
    "--show-private",
    is_flag=True,
    help="Name the Hub datasets that are not known to be public.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing README.md.")
def card(  # noqa: PLR0913 (one argument per flag)
    run: str,
    name: str,
    base: str | None,
    prompts: str | None,
    samples: int | None,
    online: bool,
    show_private: bool,
    overwrite: bool,
) -> None:
    """Write a model card into RUN: README.md with training data, results and usage.

    File names, names of private or gated datasets, prompts and answers are left out, unless
    --show-private, --samples or --prompts asks for them. Edit the file as you like; `push` uploads
    it.
    """
    from mlx_dpo.hub.run_card import check_no_card, make_run_card, write_card
    from mlx_dpo.runs.stages.find import run_folder

    folder = run_folder(run)
    if not overwrite:
        check_no_card(folder)  # before the work
    model_card, notes = make_run_card(
        run,
        name,
        base=base,
        prompts=prompts,
        samples=samples,
        online=online,
        show_private=show_private,
    )
    path = write_card(folder, model_card, overwrite=overwrite)
    for note in notes:
        echo(f"Note: {note}", err=True)
    echo(f"{path}: check and edit it, then run: mlx-dpo push {shlex.quote(str(run))} {name}")
