"""Command line of mlx-dpo. Each command has its own module, imported when the command is used."""

import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from mlx_dpo.cli.output import echo, escape_messages_of_libraries, print_traceback, print_warning
from mlx_dpo.errors import DPOError
from mlx_dpo.io.notices import LOGGER
from mlx_dpo.io.write_errors import describe_disk_error
from mlx_dpo.phases import announce
from mlx_dpo.reporting.terminal.status import status_on_stderr
from mlx_dpo.terminal_text import escape_controls, escape_line

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
INTERRUPTED = 130  # exit status that shells report for a program stopped by Ctrl-C
NAME_ERRORS = {
    errno.ENAMETOOLONG: "the name is too long for a file",
    errno.ELOOP: "a loop of symbolic links",
}
OUT_OF_MEMORY = (
    "memory ran out; close other programs, use a smaller model or batch, or raise the limit of "
    "this shell (`ulimit -d`, `ulimit -v`)"
)
OUT_OF_FILES = "too many files are open; raise the limit of this shell (`ulimit -n 1024`)"
OUT_OF_THREADS = (
    "no more threads can be started; raise the limits of this shell (`ulimit -u`, `ulimit -d`, "
    "`ulimit -v`)"
)
LIMITS = {errno.EMFILE: OUT_OF_FILES, errno.ENFILE: OUT_OF_FILES, errno.ENOMEM: OUT_OF_MEMORY}
LIMIT_SIGNS = {  # how messages of libraries tell which limit it was
    "can't start new thread": OUT_OF_THREADS,
    "ThreadPoolBuildError": OUT_OF_THREADS,
    "Unable to allocate": OUT_OF_MEMORY,
    "bad_alloc": OUT_OF_MEMORY,
}


class NoticePrinter(logging.Handler):
    """Print the notices of the library to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a notice as one line."""
        print_warning(record.getMessage())


class Commands(click.Group):
    """A click group that imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order in which the help lists them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import and return the command `name`; return None if there is no such command."""
        if name not in COMMANDS:
            return None
        command = getattr(import_module(f"mlx_dpo.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands to the help text, without shortening their descriptions."""
        rows = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(n, c.get_short_help_str(limit=200)) for n, c in rows if c])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Import the command; show that first, because importing MLX takes seconds."""
        wants_help = not {"-h", *ctx.help_option_names}.isdisjoint(args)
        if args[0] in COMMANDS and "mlx_lm" not in sys.modules and not wants_help:
            announce("Importing MLX")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line up to the name of the command."""
        try:
            return super().parse_args(ctx, args)
        except click.ClickException as error:
            raise _escape_message(error) from error.__cause__

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print an error that the user can fix as one line, and exit with 1.

        Any other exception keeps its traceback. With MLX_DPO_DEBUG=1, the traceback of an error
        that the user can fix is printed before the line.
        """
        if not any(isinstance(handler, NoticePrinter) for handler in LOGGER.handlers):
            LOGGER.addHandler(NoticePrinter())
        try:
            with _limits_explained(), status_on_stderr():
                return super().invoke(ctx)
        except (DPOError, OSError, ImportError) as error:
            message = user_message(error)
            if message is None:
                raise
            if os.environ.get("MLX_DPO_DEBUG", "0") not in ("", "0"):
                print_traceback(type(error), error, error.__traceback__)
            raise click.ClickException(escape_line(message)) from error
        except click.ClickException as error:
            raise _escape_message(error) from error.__cause__
        except KeyboardInterrupt:
            echo("Interrupted", err=True)
            sys.exit(INTERRUPTED)


@contextmanager
def _limits_explained() -> Iterator[None]:
    """Report in one line that memory, threads or files ran out; pass on any other exception."""
    try:
        yield
    except BaseException as error:
        if (message := limit_message(error)) is None:
            raise
        raise click.ClickException(message) from error


def _escape_message(error: click.ClickException) -> click.ClickException:
    """Return an error of click with visible control characters; they come from arguments."""
    message = error.format_message()
    shown = escape_controls(message)
    if shown == message:
        return error
    if isinstance(error, click.UsageError):
        return click.UsageError(shown, error.ctx)
    return click.ClickException(shown)


def user_message(error: DPOError | OSError | ImportError) -> str | None:
    """Return the message of an error that the user can fix, or None for any other error."""
    if isinstance(error, DPOError):
        return str(error)
    if isinstance(error, OSError):
        return _system_message(error)
    if "libmlx" not in str(error):
        return None
    return "MLX is installed without a backend; on Linux: pip install 'mlx[cpu]', or mlx[cuda13]"


def _system_message(error: OSError) -> str | None:
    if error.errno in LIMITS:
        return LIMITS[error.errno]
    if error.errno in NAME_ERRORS:
        return f"{error.filename}: {NAME_ERRORS[error.errno]}; choose another name"
    return describe_disk_error(error)


def limit_message(error: BaseException) -> str | None:
    """Return the message of an error because memory, threads or files ran out, or None.

    Libraries report it by a `RuntimeError`, tokenizers by a panic, which is no `Exception`.
    """
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError) or type(error).__name__ == "PanicException":
        text = str(error)
        return next((message for sign, message in LIMIT_SIGNS.items() if sign in text), None)
    return None


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
    mlx-dpo plan pairs.jsonl --model model                estimate memory and time
    mlx-dpo train pairs.jsonl --model model --output run  DPO with LoRA
    mlx-dpo chat run                                      talk to the result
    """


def program() -> str:
    """Return the command with which the user can run mlx-dpo again.

    The command is the program's name, or the program's path if the name is not on PATH.
    """
    called = Path(sys.argv[0])
    if called.name != NAME or shutil.which(NAME) is not None:
        return NAME
    return min(str(called.resolve()), os.path.relpath(called), key=len)


def main() -> None:
    """Run the `mlx-dpo` command line."""
    escape_messages_of_libraries()
    try:
        cli()
    except ImportError as error:  # `--help` imports every command, outside of `invoke`
        if (message := user_message(error)) is None:
            raise
        sys.exit(f"Error: {escape_line(message)}")
