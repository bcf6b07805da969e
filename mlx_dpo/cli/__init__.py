"""Command line of mlx-dpo. Each command has its own module, imported when the command is used."""

import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from mlx_dpo.cli.command import Group
from mlx_dpo.cli.output import (
    echo,
    escape_messages_of_libraries,
    is_silent,
    print_error,
    print_traceback,
    print_warning,
    show_cursor,
    silence,
)
from mlx_dpo.distributed import heartbeats
from mlx_dpo.distributed.environment import find_rank
from mlx_dpo.distributed.launcher_pipe import divert_native_output, is_launched
from mlx_dpo.errors import ConfigError, DPOError, shows_tracebacks
from mlx_dpo.io.notices import LOGGER
from mlx_dpo.io.write_errors import describe_disk_error
from mlx_dpo.phases import announce
from mlx_dpo.terminal_text import escape_controls, escape_line

GROUPS = {  # the commands in the order of the help text, with a line for each
    "Start": {
        "demo": "convert, train, measure and compare a tiny model in minutes",
        "doctor": "show versions and limits, and run a self-test of training",
        "bench": "measure the speed of this machine in two minutes",
    },
    "Data": {
        "data": "check, show, split and clean preference pairs",
        "collect": "make pairs from a model's own answers",
    },
    "Train": {
        "plan": "estimate memory and time before training",
        "convert": "convert a Hugging Face model to MLX, optionally quantized",
        "train": "train an adapter on pairs: DPO with LoRA",
        "loop": "collect, train and evaluate in rounds: iterative DPO",
        "losses": "list the losses with equations and sources",
        "config": "translate a configuration of TRL, LLaMA-Factory or Axolotl",
    },
    "Look": {
        "report": "plot training curves as HTML and PNG",
        "eval": "measure a run: pairs, benchmarks, drift",
        "score": "score answers with a run as reward model",
        "compare": "show answers of base and aligned model side by side",
        "winrate": "compute the win rate against the base or another model",
    },
    "Use": {
        "chat": "chat with base and aligned model",
        "generate": "answer one prompt",
        "serve": "run an OpenAI-compatible server on this machine",
    },
    "Share": {
        "fuse": "merge the adapter into the weights and verify the result",
        "export": "add PEFT's files to an adapter, for transformers",
        "card": "write a model card",
        "push": "upload an adapter to the Hub, private by default",
        "pull": "download an adapter from the Hub",
    },
    "Disk": {
        "cache": "list or clear cached log-probs, tokens and replies",
    },
}
DESCRIPTIONS = {name: text for group in GROUPS.values() for name, text in group.items()}
COMMANDS = tuple(DESCRIPTIONS)
WITH_RANKS = ("train", "doctor")  # commands that several ranks can run together
OTHER_NAMES = {  # words of other tools, and what to type here
    **dict.fromkeys(
        ("dpo", "sft", "kto", "orpo", "lora", "qlora", "finetune", "fine-tune", "tune", "fit"),
        "use `mlx-dpo train`",
    ),
    **dict.fromkeys(("grpo", "ppo", "rlhf", "online-dpo"), "use `mlx-dpo loop` (iterative DPO)"),
    **dict.fromkeys(("resume", "continue"), "use `mlx-dpo train --resume --output RUN`"),
    **dict.fromkeys(("inference", "infer", "predict", "complete"), "use `mlx-dpo generate`"),
    **dict.fromkeys(("run", "talk"), "use `mlx-dpo chat`"),
    **dict.fromkeys(("server", "api"), "use `mlx-dpo serve`"),
    **dict.fromkeys(("upload", "publish"), "use `mlx-dpo push`"),
    "download": "use `mlx-dpo pull` for an adapter; models are downloaded by the commands that use "
    "them",
    **dict.fromkeys(("merge", "gguf"), "use `mlx-dpo fuse`"),
    **dict.fromkeys(("quantize", "quantise"), "use `mlx-dpo convert --bits 4`"),
    **dict.fromkeys(
        ("test", "evaluate", "validate"),
        "use `mlx-dpo eval` for a run, or `mlx-dpo doctor` for this machine",
    ),
    **dict.fromkeys(
        ("benchmark", "speed", "speedtest"),
        "use `mlx-dpo bench` for this machine, or `mlx-dpo eval` for a run",
    ),
    **dict.fromkeys(("plot", "curves", "logs"), "use `mlx-dpo report`"),
    **dict.fromkeys(("dataset", "datasets", "check"), "use `mlx-dpo data check`"),
    **dict.fromkeys(("split", "show", "clean"), "use `mlx-dpo data`"),
    **dict.fromkeys(("env", "version", "info"), "use `mlx-dpo doctor`"),
    **dict.fromkeys(
        ("reward", "rewards", "reward-model", "rewardbench"), "use `mlx-dpo score RUN ROWS`"
    ),
    "help": "use `mlx-dpo --help`",
}
NAME = "mlx-dpo"
INTERRUPTED = 130  # exit status that shells report for a program stopped by Ctrl-C
NAME_ERRORS = {
    errno.ENAMETOOLONG: "the name is too long for a file",
    errno.ELOOP: "a loop of symbolic links",
}
UNREAD = "the output is not read any more"
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
        """Print a notice as one line; an error is the last one before the process ends."""
        if record.levelno >= logging.ERROR:
            print_error(escape_line(record.getMessage()))
            show_cursor()
        else:
            print_warning(record.getMessage())


class Commands(Group):
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
        command.short_help = DESCRIPTIONS[name]  # completion shows it
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands to the help text by group, without importing their modules."""
        width = max(map(len, COMMANDS))
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{width}}", text) for name, text in commands.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Import the command; show that first, because importing MLX takes seconds."""
        if args[0] not in WITH_RANKS:
            _check_no_rank(args[0])
        wants_help = not {"-h", "--help-all", *ctx.help_option_names}.isdisjoint(args)
        if args[0] in COMMANDS and "mlx_lm" not in sys.modules and not (wants_help or is_silent()):
            announce("Starting the ranks" if is_launched() else "Importing MLX")
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
        from mlx_dpo.reporting.terminal.status import status_on_stderr  # not for `--help`

        if not any(isinstance(handler, NoticePrinter) for handler in LOGGER.handlers):
            LOGGER.addHandler(NoticePrinter())
        try:
            status = nullcontext() if is_silent() else status_on_stderr()
            with _end_announced(), _limits_explained(), status:
                return super().invoke(ctx)
        except (DPOError, OSError, ImportError) as error:
            message = user_message(error)
            if message is None:
                raise
            if shows_tracebacks():
                print_traceback(type(error), error, error.__traceback__)
            if is_silent() and _is_shared(error):
                sys.exit(1)  # rank 0 prints it
            raise click.ClickException(escape_line(message)) from error
        except click.ClickException as error:
            raise _escape_message(error) from error.__cause__
        except KeyboardInterrupt:
            echo("Interrupted", err=True)
            sys.exit(INTERRUPTED)


@contextmanager
def _end_announced() -> Iterator[None]:
    """Let the other ranks of a run know how this one ends, if not by itself."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # Rich's way to end
            heartbeats.report_error(UNREAD)
        heartbeats.leave(error.code if isinstance(error.code, int) else 0)
        raise
    except KeyboardInterrupt:
        heartbeats.leave(INTERRUPTED)
        raise
    except (DPOError, OSError, ImportError) as error:
        # click ends this process without a message if its output is not read.
        message = UNREAD if isinstance(error, BrokenPipeError) else user_message(error)
        if _is_shared(error):
            heartbeats.leave(1)
        elif message is not None:
            heartbeats.report_error(message)
        raise
    except click.ClickException as error:
        heartbeats.report_error(error.format_message(), error.exit_code)
        raise


def _is_shared(error: Exception) -> bool:
    """Return whether all ranks of a run raise the error."""
    return isinstance(error, DPOError) and error.is_shared


def _check_no_rank(command: str) -> None:
    """Raise `ConfigError` if a launcher started this process as one of several ranks."""
    if (rank := find_rank(os.environ)) is None:
        return
    error = ConfigError(
        f"`{NAME} {command}` runs in one process, but this one was started as rank {rank} of "
        "several; start it without the launcher (only `train` shares its work)"
    )
    error.is_shared = True
    raise error


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
    other_names=OTHER_NAMES,
    examples=(
        "mlx-dpo demo                                 see it work in a few minutes",
        "mlx-dpo data check pairs.jsonl               find problems in your pairs",
        "mlx-dpo train pairs.jsonl --model MODEL --output run",
        "mlx-dpo compare run                          what did training change?",
        "mlx-dpo chat run                             talk to the result",
    ),
    epilog="`mlx-dpo COMMAND --help` shows examples and flags. Tab completion for zsh (also bash, "
    'fish): add `eval "$(_MLX_DPO_COMPLETE=zsh_source mlx-dpo)"` to ~/.zshrc.',
)
@click.version_option(package_name="mlx-dpo")
def cli() -> None:
    """Align a language model with your preferences, on your own machine."""


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
    divert_native_output()
    escape_messages_of_libraries()
    try:
        if find_rank(os.environ):
            silence()
    except ConfigError as error:
        sys.exit(f"Error: {escape_line(str(error))}")
    try:
        cli()
    except ImportError as error:  # `--help` imports every command, outside of `invoke`
        if (message := user_message(error)) is None:
            raise
        sys.exit(f"Error: {escape_line(message)}")
