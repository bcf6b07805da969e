"""The commands that start the ranks of a run on the machines of a hostfile."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mlx_dpo.cli.output import print_error, print_warning
from mlx_dpo.cli.ranks_flags import RanksFlags
from mlx_dpo.distributed.hosts.check import check_hosts, default_place, sleep_warnings
from mlx_dpo.distributed.hosts.hostfile import read_hostfile
from mlx_dpo.distributed.hosts.ssh import rank_commands
from mlx_dpo.distributed.launch import BLAS_THREADS, RankCommand
from mlx_dpo.errors import ConfigError
from mlx_dpo.phases import phase


@contextmanager
def commands_on_hosts(
    wanted: RanksFlags, argv: Sequence[str], inputs: Sequence[str], *, keeps_awake: bool
) -> Iterator[list[RankCommand]]:
    """Check all hosts and yield the command of each rank; their files exist inside the block.

    Args:
        wanted: the flags.
        argv: the command of a rank.
        inputs: files and folders of this machine that each host needs as well.
        keeps_awake: whether each rank keeps its Mac awake.

    Raises:
        ConfigError: the hostfile is wrong, or a host is not ready. If several are not, a line about
            each of the others is printed before.
    """
    assert wanted.hosts is not None
    file = read_hostfile(Path(wanted.hosts).expanduser())
    place = default_place()
    if wanted.host_python is not None:
        place = replace(place, python=wanted.host_python)
    if wanted.host_folder is not None:
        place = replace(place, folder=wanted.host_folder)
    with phase("Checking the hosts"):
        checked = check_hosts(file, place, inputs, wanted.starting_port)
    if checked.problems:
        for line in checked.problems[:-1]:
            print_error(line)
        raise ConfigError(checked.problems[-1])
    if not keeps_awake:
        for line in sleep_warnings(checked.facts):
            print_warning(line)
    threads = os.environ.get(BLAS_THREADS, str(checked.threads(file)))
    with tempfile.TemporaryDirectory(prefix="mlx-dpo-") as folder:
        yield rank_commands(file, place, argv, checked.ports, threads, Path(folder))
