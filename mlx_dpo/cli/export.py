"""`mlx-dpo export`: the adapter of a run in PEFT's layout as well."""

import click


@click.command()
@click.argument("run")
@click.option(
    "--base",
    metavar="MODEL",
    help="The Hugging Face checkpoint that the run's model was made from: a folder or a Hub id.",
)
@click.option("--revision", metavar="TEXT", help="Hub revision of --base.")
def export(run: str, base: str | None, revision: str | None) -> None:
    """Make the adapter of RUN load in transformers + PEFT too, from the same folder.

    A run does this by itself where its model is a Hugging Face checkpoint. Where that was
    converted or quantised for MLX, --base names the original, on whose tensors every name and
    shape is proved; of a Hub id only headers are downloaded. Weights that lie here are compared
    as well.
    """
    from mlx_dpo.saved_runs.export_peft import export_run

    click.echo(f"{run}: its adapter {export_run(run, base, revision)}")
