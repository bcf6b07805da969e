"""`mlx-dpo export`: write a run's adapter in PEFT's layout, next to mlx-lm's files."""

import click

from mlx_dpo.cli.command import FOLDER, Command
from mlx_dpo.cli.output import echo


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo export run",
        "mlx-dpo export run --base-model Qwen/Qwen2.5-0.5B-Instruct",
    ),
    renamed={"--base": "use --base-model MODEL"},
)
@click.argument("run", type=FOLDER)
@click.option(
    "--base-model",
    "base",
    type=FOLDER,
    metavar="MODEL",
    help="Hugging Face checkpoint that the run's model was made from: a folder or a Hub id.",
)
@click.option("--revision", metavar="REVISION", help="Hub revision of --base-model.")
def export(run: str, base: str | None, revision: str | None) -> None:
    """Add PEFT's files to the adapter of RUN, so that transformers + PEFT can load it too.

    `train` does this if its model is a Hugging Face checkpoint. If the model was converted or
    quantized for MLX, --base-model names the original checkpoint, against which all names and
    shapes are checked. Only headers are downloaded from the Hub; the weights of a local checkpoint
    are compared as well.
    """
    from mlx_dpo.saved_runs.export_peft import export_run

    echo(f"{run}: its adapter {export_run(run, base, revision)}")
