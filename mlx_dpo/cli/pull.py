"""`mlx-dpo pull`: download an adapter from the Hub."""

import shlex
from pathlib import Path

import click

from mlx_dpo.cli.command import Command
from mlx_dpo.cli.output import echo


@click.command(cls=Command, examples=("mlx-dpo pull me/my-adapter --output adapter",))
@click.argument("name", metavar="ORG/NAME")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="New folder to write.",
)
@click.option("--revision", metavar="REVISION", help="Hub revision of the adapter.")
def pull(name: str, output: Path, revision: str | None) -> None:
    """Download the adapter ORG/NAME, in mlx-lm's or PEFT's format.

    Only safetensors files, configs and pictures are downloaded, and no code.
    """
    from mlx_dpo.cli import program
    from mlx_dpo.hub.pull import pull_adapter
    from mlx_dpo.units import format_bytes

    adapter = pull_adapter(name, output, revision)
    base_model = adapter.base_model or "an unknown base model"
    echo(f"{output}: {format_bytes(adapter.size_bytes)}, for {base_model}")
    base = shlex.quote(adapter.base_model or "MODEL")
    echo(f"Next: {program()} chat --model {base} --adapter {shlex.quote(str(output))}")
