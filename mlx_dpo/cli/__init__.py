"""The command line: parse, call, print. One file per command, loaded when it is called."""

import errno
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from mlx_dpo.errors import DPOError

COMMANDS = (
    "convert",
    "data",
    "plan",
    "losses",
    "train",
    "report",
    "eval",
    "chat",
    "compare",
    "serve",
    "generate",
    "collect",
    "winrate",
    "loop",
    "fuse",
    "export",
    "card",
    "push",
    "pull",
    "demo",
    "doctor",
    "cache",
)
NAME = "mlx-dpo"
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


class Commands(click.Group):
    """Commands that are imported by name, so that `--help` does not load a model library."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All of them, in the order in which a person meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of that name, from the file of that name."""
        if name not in COMMANDS:
            return None
        command = getattr(import_module(f"mlx_dpo.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What each does, whole: a narrow terminal folds it."""
        rows = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(n, c.get_short_help_str(limit=200)) for n, c in rows if c])

    def invoke(self, ctx: click.Context) -> Any:
        """Turn errors that a person can mend into one line; any other keeps its traceback."""
        try:
            return super().invoke(ctx)
        except DPOError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror}") from error
        except ImportError as error:
            if "libmlx" not in str(error):
                raise
            raise click.ClickException(
                "MLX is installed without a backend; on Linux: pip install 'mlx[cpu]', or "
                "mlx[cuda13]"
            ) from error
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            sys.exit(INTERRUPTED)


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.version_option(package_name="mlx-dpo")
def cli() -> None:
    """Align a language model with your preferences, on your own machine.

    \b
    mlx-dpo demo                                          see it work in three minutes
    mlx-dpo convert ORG/MODEL --bits 4 --output model     Hugging Face to MLX
    mlx-dpo plan pairs.jsonl --model model                what training on them is going to need
    mlx-dpo train pairs.jsonl --model model --output run  DPO with LoRA
    mlx-dpo chat run                                      talk to the result
    """


def program() -> str:
    """What to type for this program: its path where a bare name would not find it."""
    called = Path(sys.argv[0])
    if called.name != NAME or shutil.which(NAME) is not None:
        return NAME
    return min(str(called.resolve()), os.path.relpath(called), key=len)


def main() -> None:
    """Entry point of the `mlx-dpo` command."""
    cli()
