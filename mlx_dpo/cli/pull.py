"""`mlx-dpo pull`: an adapter from the Hub."""

import shlex
from pathlib import Path

import click


@click.command()
@click.argument("name", metavar="ORG/NAME")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--revision", metavar="TEXT", help="Hub revision of the adapter.")
def pull(name: str, output: Path, revision: str | None) -> None:
    """Bring the adapter ORG/NAME, in mlx-lm's layout or PEFT's, and say how to talk to it.

    Safetensors and settings alone are fetched; nothing that runs.
    """
    from mlx_dpo.cli import program
    from mlx_dpo.hub.push import pull_adapter
    from mlx_dpo.units import format_bytes

    pulled = pull_adapter(name, output, revision)
    base_model = pulled.base_model or "a base it does not name"
    click.echo(f"{output}: {format_bytes(pulled.bytes)}, for {base_model}")
    base = shlex.quote(pulled.base_model or "MODEL")
    click.echo(f"Next: {program()} chat --model {base} --adapter {shlex.quote(str(output))}")
