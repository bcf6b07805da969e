"""`mlx-dpo config`: translate configurations of other trainers."""

from pathlib import Path

import click

from mlx_dpo.cli.command import FILE, Command, Group
from mlx_dpo.cli.output import echo
from mlx_dpo.errors import ConfigError


@click.group(
    cls=Group,
    examples=("mlx-dpo config from theirs.yaml --output settings.yaml",),
)
def config() -> None:
    """Translate a configuration of TRL, LLaMA-Factory, Axolotl, Unsloth or mlx-lm-lora."""


@config.command(
    "from",
    cls=Command,
    examples=(
        "mlx-dpo config from theirs.yaml",
        "mlx-dpo config from theirs.yaml --output settings.yaml",
    ),
)
@click.argument("file", type=FILE)
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="FILE",
    help="New YAML file to write.",
    show_default="print it",
)
def translate_file(file: str, output: str | None) -> None:
    """Translate FILE, a YAML or JSON configuration of another trainer, into our settings.

    The trainer is recognized by its settings. Comments name each setting that changes its meaning,
    is not needed or has no equivalent.
    """
    from mlx_dpo.cli import program
    from mlx_dpo.config.translation.translate import translate
    from mlx_dpo.config.yaml_file import read_yaml
    from mlx_dpo.io.atomic import write_file

    path = None if output is None else Path(output).expanduser()
    if path is not None and path.exists():
        raise ConfigError(f"{output} already exists; choose another path or delete it")
    values = read_yaml(file)
    try:
        translation = translate(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    count, left = len(translation.settings), len(translation.left_out)
    echo(
        f"{file}: a configuration of {translation.trainer}; {count} settings written, "
        f"{left} left out (see the comments)",
        err=True,
    )
    if path is None:
        echo(translation.to_yaml(), nl=False)
        return
    write_file(path, translation.to_yaml())
    echo(f"{output}: train with {program()} train --config {output}")
