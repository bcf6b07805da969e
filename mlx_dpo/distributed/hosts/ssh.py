"""Start programs on other machines over ssh, and the ranks of a run on the hosts of a hostfile.

The user's own ssh is used, with its configuration and keys. Commands hold base64, paths and options
alone, so that each login shell (sh, zsh, fish, csh) passes them on unchanged.
"""

import base64
import json
import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import Any

from mlx_dpo.distributed.environment import RANK, RANK_TIMEOUT
from mlx_dpo.distributed.hosts.hostfile import THIS_MACHINE, Host, Hostfile
from mlx_dpo.distributed.hosts.remote import facts, run_rank
from mlx_dpo.distributed.launch import BLAS_THREADS, RankCommand
from mlx_dpo.distributed.launcher_pipe import LAUNCHED

CONNECT_SECONDS = 10
KEEPALIVE_SECONDS = 15
KEEPALIVES = 20  # without an answer; longer than heartbeats take, which name the last step
# Removes the working folder from the path of imports: its files are not a part of the program.
RUN_PROGRAM = (
    "import base64,sys;sys.path[:]=[p for p in sys.path if p];exec(base64.b64decode(sys.argv[1]))"
)
PROGRAMS = {module: Path(module.__file__ or "").read_bytes() for module in (facts, run_rank)}
FORWARDED = (RANK_TIMEOUT, "MLX_DPO_DEBUG")  # variables of this process that all ranks need


@dataclass(frozen=True)
class Place:
    """Where mlx-dpo is on the other hosts.

    Attributes:
        python: path of the Python that has mlx-dpo; `~/` is the home folder there.
        folder: working folder; relative paths of pairs and of the model begin there.
    """

    python: str
    folder: str


def is_this_machine(host: Host) -> bool:
    """Return whether a host is the machine of this process, so that it needs no ssh."""
    user, _, name = host.ssh.rpartition("@")
    if user and user != getuser():
        return False
    own = socket.gethostname().lower()
    names = {own, own.partition(".")[0], own.partition(".")[0] + ".local", *THIS_MACHINE}
    return name.lower() in names or any(map(_is_own_address, host.addresses))


def _is_own_address(address: str) -> bool:
    if address.startswith("127."):  # each machine has it
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def ssh_argv(host: str, python: str, program: Any, request: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the command that runs a program of `remote/` on another machine.

    Args:
        host: name for ssh.
        python: path of Python there.
        program: its module.
        request: what the program is to do, a value of JSON.
    """
    remote = [RUN_PROGRAM, _encode(PROGRAMS[program]), _encode(json.dumps(request).encode())]
    return (
        "ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}",
        "-o", f"ServerAliveInterval={KEEPALIVE_SECONDS}", "-o", f"ServerAliveCountMax={KEEPALIVES}",
        "-o", "LogLevel=ERROR", "--", host,
        f"exec {quote_path(python)} -c {shlex.join(remote)}",
    )  # fmt: skip


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def quote_path(path: str) -> str:
    """Return a path for a shell; `~/` at its beginning stays the home folder."""
    home, rest = ("~/", path[2:]) if path.startswith("~/") else ("", path)
    return home + shlex.quote(rest)


def rank_commands(
    file: Hostfile,
    place: Place,
    argv: Sequence[str],
    ports: Sequence[Sequence[int]],
    threads: str,
    folder: Path,
) -> list[RankCommand]:
    """Return the commands that start the ranks of a hostfile.

    Args:
        file: the hosts.
        place: where mlx-dpo is on the other hosts.
        argv: the command of a rank, without its Python.
        ports: by rank, a port for each address of its host.
        threads: for BLAS in each rank, unless the hostfile sets them.
        folder: an empty folder of this machine, for the files of its own ranks.
    """
    fixed, files = _connection(file, ports)
    shared = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    shared |= {BLAS_THREADS: threads} | dict(file.environment) | fixed
    own = dict(shared)
    for variable, text in files.items():
        own[variable] = str(folder / variable)
        (folder / variable).write_text(text, encoding="utf-8")
    commands = []
    for rank, host in enumerate(file.hosts):
        if is_this_machine(host):
            command = RankCommand(host.ssh, tuple(argv), own | {RANK: str(rank)})
        else:
            request = {
                "folder": place.folder,
                "argv": [place.python, *argv[1:]],
                "environment": shared | {RANK: str(rank), LAUNCHED: "1"},
                "files": files,
            }
            command = RankCommand(host.ssh, ssh_argv(host.ssh, place.python, run_rank, request), {})
        commands.append(command)
    return commands


def _connection(
    file: Hostfile, ports: Sequence[Sequence[int]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the variables by which ranks find each other, and texts of files by variable."""
    addresses = [
        [f"{address}:{port}" for address, port in zip(host.addresses, own, strict=False)]
        for host, own in zip(file.hosts, ports, strict=True)
    ]
    if file.backend == "ring":
        return {}, {"MLX_HOSTFILE": json.dumps(addresses)}
    variables = {"MLX_JACCL_COORDINATOR": addresses[0][0]}
    if file.backend == "jaccl-ring":
        variables["MLX_JACCL_RING"] = "1"
    return variables, {"MLX_IBV_DEVICES": json.dumps([list(host.rdma) for host in file.hosts])}
