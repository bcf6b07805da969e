"""Start the ranks of a run, on this machine or on several hosts."""

import os
import socket
import sys
from collections.abc import Callable, Sequence

from mlx_dpo.cli.output import print_error, print_line_of_library, show_cursor
from mlx_dpo.cli.ranks_flags import RanksFlags
from mlx_dpo.distributed.environment import RANK_TIMEOUT, find_rank
from mlx_dpo.distributed.launch import RankCommand, launch, ring_on_this_machine
from mlx_dpo.distributed.launcher_pipe import is_launched, obey_launcher
from mlx_dpo.errors import ConfigError
from mlx_dpo.phases import paused

# Like the installed program, with the name that it was called by: `cli.program` shows it.
PROGRAM = "import sys; del sys.argv[0]; from mlx_dpo.cli import main; main()"


def start_ranks(
    wanted: RanksFlags,
    pairs: Sequence[str] = (),
    find_inputs: Callable[[], list[str]] = list,
    *,
    keeps_awake: bool = True,
) -> None:
    """Start the ranks that the flags ask for and exit with their code; return if there are none.

    In a rank that was started already, follow its launcher and return.

    Args:
        wanted: the flags.
        pairs: sources of pairs, as the user wrote them.
        find_inputs: returns the files and folders that each host needs.
        keeps_awake: whether each rank keeps its Mac awake.

    Raises:
        ConfigError: a flag has no effect, the ranks cannot read the pairs, or a host is not ready.
    """
    obey_launcher()
    is_rank = find_rank(os.environ) is not None
    if wanted.starts_ranks and is_rank and not is_launched():
        flag = "--ranks" if wanted.hosts is None else "--hosts"
        raise ConfigError(f"`{flag}` has no effect: this process was started as a rank already")
    wanted.check()
    if wanted.rank_timeout is not None:
        if not wanted.starts_ranks and not is_rank:
            raise ConfigError(
                "`--rank-timeout` has no effect without several ranks (--ranks or --hosts)"
            )
        os.environ[RANK_TIMEOUT] = str(wanted.rank_timeout)
    if not wanted.starts_ranks or is_rank:
        return
    if "-" in pairs:
        raise ConfigError(
            "PAIRS: several ranks cannot read from standard input (`-`); write the rows to a file"
        )
    argv = (sys.executable, "-P", "-c", PROGRAM, *sys.argv)
    if wanted.hosts is None:
        with ring_on_this_machine(wanted.ranks) as variables:
            sys.exit(_run([RankCommand(socket.gethostname(), argv, own) for own in variables]))
    from mlx_dpo.cli.commands_on_hosts import commands_on_hosts  # imports MLX

    with commands_on_hosts(wanted, argv, find_inputs(), keeps_awake=keeps_awake) as commands:
        sys.exit(_run(commands))


def _run(commands: Sequence[RankCommand]) -> int:
    """Start ranks by their commands; return the exit code of the run."""
    with paused():
        try:
            return launch(commands, print_error, print_line_of_library)
        finally:
            show_cursor()  # a rank that was killed may have hidden it
