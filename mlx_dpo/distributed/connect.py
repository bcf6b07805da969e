"""Connect this process to the other ranks of its run, once."""

import atexit
import json
import os
import secrets
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType

from mlx_dpo import phases
from mlx_dpo.distributed import heartbeats, launcher_pipe
from mlx_dpo.distributed.control_line import Link, Listener, connect_to
from mlx_dpo.distributed.environment import find_backend, find_timeout
from mlx_dpo.distributed.heartbeats import VERDICT_SECONDS, Heartbeats
from mlx_dpo.distributed.ranks import Ranks, RanksError
from mlx_dpo.errors import ConfigError, reason

LOOPBACK = "127.0.0.1"
INTERRUPTED = 130  # exit code of a process that Ctrl-C ended
OPEN_FILES = "/dev/fd"  # on macOS and Linux


@cache
def connect() -> Ranks:
    """Return this process's place among the ranks; the first call connects to the others.

    MLX cannot close a connection, so there is one per process.

    Raises:
        ConfigError: variables are missing, or the other ranks cannot be reached.
    """
    if find_backend(os.environ) is None:
        return Ranks()
    launcher_pipe.obey_launcher()
    timeout = find_timeout(os.environ)
    phases.announce("Connecting to the other ranks")
    with _ended_after(timeout):
        with _close_in_children():
            ranks = Ranks.from_environment()
        if ranks.is_alone:
            return ranks
        control_line = _start_heartbeats(ranks, timeout)
    control_line.wait_until_connected()
    _announce_end(ranks)
    return ranks


def _start_heartbeats(ranks: Ranks, timeout: float) -> Heartbeats:
    """Connect all ranks with rank 0, which sends them its address and a token."""
    hosts = ranks.all_gather_json("hosts", socket.gethostname())
    offer: tuple[str, int, str] | None = None
    if ranks.is_main:
        token = secrets.token_hex(32)
        listener = Listener(_address_of_rank_0(ranks, hosts), token)
        offer = (*listener.address, token)
    host, port, token = ranks.broadcast_json("control line", offer)
    peer: Listener | Link = (
        listener if ranks.is_main else connect_to((host, port), ranks.rank, token, timeout)
    )
    control_line = Heartbeats(ranks, hosts, peer, timeout)
    heartbeats.use(control_line)
    phases.watch(control_line.note_phase)
    launcher_pipe.call_when_gone(control_line.end_without_launcher)

    def explain_loss(message: str) -> RanksError:
        """Wait for the verdict on the rank that MLX has lost, which ends this process."""
        time.sleep(VERDICT_SECONDS)
        return RanksError(
            f"rank {ranks.rank} ({hosts[ranks.rank]}): MLX lost the connection to another rank "
            f"({message}), although all ranks run; try `mlx-dpo doctor --hosts FILE`"
        )

    ranks.watch(control_line.note_progress, explain_loss)
    return control_line


def _address_of_rank_0(ranks: Ranks, hosts: list[str]) -> str:
    """Return the address of this machine that the ranks use.

    Raises:
        ConfigError: the host file cannot be read.
    """
    if ranks.backend == "ring":
        path = os.environ["MLX_HOSTFILE"]
        try:
            return str(json.loads(Path(path).read_text(encoding="utf-8"))[0][0]).rpartition(":")[0]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{path}: no address of rank 0 ({reason(error)})") from error
    if ranks.backend == "nccl":
        return os.environ["NCCL_HOST_IP"]
    if ranks.backend == "jaccl" and "MLX_JACCL_COORDINATOR" in os.environ:
        return os.environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
    return LOOPBACK if len(set(hosts)) == 1 else _outward_address()


def _outward_address() -> str:
    """Return the address of this machine on the network of its default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # RFC 5737: an address of no host; UDP sends nothing
        return str(probe.getsockname()[0])


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM if the block takes longer.

    MLX waits for the other ranks without end and lets no other thread of Python run, but a signal
    that Python does not handle ends the process.
    """
    is_free = signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    if is_free:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if is_free:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _close_in_children() -> Iterator[None]:
    """Keep the sockets that MLX opens in the block out of the children of this process.

    A child that holds the socket of a rank would hide the end of the rank.
    """
    before = _sockets()
    try:
        yield
    finally:
        opened = _sockets() - before
        for number in opened:
            os.set_inheritable(number, False)

        def close() -> None:
            for number in opened:
                os.close(number)

        os.register_at_fork(after_in_child=close)


def _sockets() -> set[int]:
    """Return the numbers of the open sockets of this process."""
    numbers = set()
    for name in os.listdir(OPEN_FILES):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                numbers.add(int(name))
        except OSError:  # the file by which the folder was read
            continue
    return numbers


def _announce_end(ranks: Ranks) -> None:
    """Let the other ranks know how this process ends: normally, or by an exception."""
    if ranks.backend == "mpi":
        atexit.register(ranks.release_group)
    atexit.register(heartbeats.leave, 0)  # before the group is released
    show = sys.excepthook

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        show(kind, error, trace)
        if issubclass(kind, KeyboardInterrupt):
            heartbeats.leave(INTERRUPTED)
        else:
            heartbeats.report_error(f"{kind.__name__}: {reason(error)}")

    sys.excepthook = report
