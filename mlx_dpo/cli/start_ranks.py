"""Start the ranks of a run: the flags `--ranks` and `--rank-timeout`."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from mlx_dpo.cli.output import print_error, show_cursor
from mlx_dpo.distributed.environment import RANK_TIMEOUT, find_rank
from mlx_dpo.distributed.launch import RankCommand, launch, ring_on_this_machine
from mlx_dpo.distributed.launched import is_launched, obey_launcher
from mlx_dpo.errors import ConfigError
from mlx_dpo.phases import paused

THIS_MACHINE = "this machine"
# Like the installed program, with the name that it was called by: `cli.program` shows it.
PROGRAM = "import sys; del sys.argv[0]; from mlx_dpo.cli import main; main()"


def ranks_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that start several ranks to a command."""
    command = click.option(
        "--rank-timeout",
        type=click.IntRange(min=1),
        metavar="SECONDS",
        show_default="120",
        help="With several ranks: end all of them when one is silent for so long.",
    )(command)
    return click.option(
        "--ranks",
        type=click.IntRange(min=1),
        default=1,
        metavar="N",
        help="Share the passes of each step among N processes on this machine; the result is the "
        "same, bit for bit.",
    )(command)


def start_ranks(count: int, timeout: int | None, pairs: Sequence[str]) -> None:
    """Start the ranks that the flags ask for and exit with their code; return if there are none.

    In a rank that was started already, follow its launcher and return.

    Raises:
        ConfigError: a flag has no effect, or the ranks cannot read the pairs.
    """
    obey_launcher()
    is_rank = find_rank(os.environ) is not None
    if count > 1 and is_rank and not is_launched():
        raise ConfigError("`--ranks` has no effect: this process was started as a rank already")
    if timeout is not None:
        if count == 1 and not is_rank:
            raise ConfigError("`--rank-timeout` has no effect without several ranks (--ranks)")
        os.environ[RANK_TIMEOUT] = str(timeout)
    if count == 1 or is_rank:
        return
    if "-" in pairs:
        raise ConfigError(
            "PAIRS: several ranks cannot read from standard input (`-`); write the rows to a file"
        )
    sys.exit(_launch_on_this_machine(count))


def _launch_on_this_machine(count: int) -> int:
    argv = (sys.executable, "-P", "-c", PROGRAM, *sys.argv)
    with paused(), ring_on_this_machine(count) as variables:
        commands = [RankCommand(THIS_MACHINE, argv, environment) for environment in variables]
        try:
            return launch(commands, print_error)
        finally:
            show_cursor()  # a rank that was killed may have hidden it
