"""Start the ranks of a run, stop them together, and end all of them when one fails.

The launcher computes nothing and imports no MLX. `launcher_pipe.py` is the other end of its pipes.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from mlx_dpo.distributed.environment import RANK
from mlx_dpo.distributed.launcher_pipe import (
    ENDED,
    LAUNCHED,
    LOST,
    NATIVE_OUTPUT,
    STOP,
    describe_end,
)
from mlx_dpo.errors import DPOError, reason
from mlx_dpo.startup.jit_cache import user_environment

GRACE_SECONDS = 5.0  # until survivors of a failure get SIGTERM, and from there to SIGKILL
FINISH_SECONDS = 60.0  # that other ranks have to end after rank 0 has finished the run
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = tuple(128 + number for number in STOP_SIGNALS)  # exit codes of a run that was stopped
TAIL_LINES = 40  # of a rank's output that are kept
LOOPBACK = "127.0.0.1"
READ_SECONDS = 1.0  # that the output of a rank may take to arrive after its end
ERROR = "Error: "  # with which the command line prints the last line of a rank
RING_NOISE = b"[ring] "  # of MLX, about each operation that waits for a lost rank
BLAS_THREADS = "OPENBLAS_NUM_THREADS"


@dataclass(frozen=True)
class RankCommand:
    """How to start a rank.

    Attributes:
        host: name of its machine in messages.
        argv: program and arguments, started without a shell.
        environment: variables that are set in addition to those of this process.
    """

    host: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def launch(
    commands: Sequence[RankCommand],
    report: Callable[[str], None],
    show: Callable[[str], None] = lambda line: None,
) -> int:
    """Start a rank per command and wait until all have ended; return the exit code of the run.

    Rank 0 writes to stdout and stderr of this process. Of the other ranks the last lines are kept,
    and reported if a rank fails without a message by rank 0. Each rank has a session of its own, so
    that Ctrl-C reaches this process alone. The first signal asks all ranks to stop after the same
    step; the second one kills them. When a rank fails, the others end by themselves, or get SIGTERM
    after `GRACE_SECONDS` and SIGKILL after as long again. No rank is left when this returns.

    Args:
        commands: the ranks in their order.
        report: prints an error message of one or several lines.
        show: prints a line that C++ code of rank 0 has written to standard error.

    Returns:
        0 if all ranks returned 0; otherwise the exit code of the rank that failed first, or 128
        plus the number of the signal that killed it; `LOST` if a rank was lost that did not end;
        128 plus the number of the signal by which this process was stopped.

    Raises:
        DPOError: a rank cannot be started.
    """
    with _Launch(commands, report, show) as running:
        return running.wait()


class _Rank:
    """A rank that runs as a child of this process."""

    def __init__(
        self,
        number: int,
        command: RankCommand,
        events: SimpleQueue[Any],
        show: Callable[[str], None],
    ) -> None:
        self.number, self.host = number, command.host
        self.status: int | None = None  # as of `subprocess`: minus the number of a signal
        self.was_ended = False  # by a signal of this launcher
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._take_line = show if number == 0 else self.tail.append
        reader, writer = os.pipe()
        native = {NATIVE_OUTPUT: str(writer)} if number == 0 else {}
        try:
            self._process = subprocess.Popen(
                command.argv, stdin=subprocess.PIPE, stdout=writer if number else None,
                stderr=writer if number else None, pass_fds=() if number else (writer,),
                env=user_environment() | {LAUNCHED: "1"} | native | dict(command.environment),
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(reader)
            raise DPOError(
                f"rank {number} ({self.host}): `{command.argv[0]}` cannot be started "
                f"({reason(error)})"
            ) from error
        finally:
            os.close(writer)
        self._watcher = threading.Thread(target=self._watch, args=(events, reader), daemon=True)
        self._watcher.start()

    @property
    def name(self) -> str:
        """The rank and its host, for messages."""
        return f"rank {self.number} ({self.host})"

    @property
    def is_lost(self) -> bool:
        """Whether the rank ended because another one was lost."""
        return self.status == LOST

    @property
    def has_crashed(self) -> bool:
        """Whether its output shows an error of the program, not of the user."""
        assert self.status is not None
        was_killed = -self.status in (signal.SIGKILL, *STOP_SIGNALS)
        has_trace = not self.is_lost and any("Traceback" in line for line in self.tail)
        return has_trace or (self.status < 0 and not was_killed)

    def _watch(self, events: SimpleQueue[Any], output: int) -> None:
        """Read the output and report the end."""
        # A thread of its own: a child of the rank may hold the pipe open after its end.
        reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        reader.start()
        status = self._process.wait()
        reader.join(READ_SECONDS)
        events.put((self, status))

    def _read(self, output: int) -> None:
        with open(output, "rb") as lines:
            for line in lines:
                if not line.startswith(RING_NOISE):
                    self._take_line(line.decode(errors="replace").rstrip())

    def send(self, line: str) -> None:
        """Write a line to standard input of the rank, which may have ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def signal(self, number: int) -> None:
        """Send a signal to the rank and the processes of its session."""
        self.was_ended = True
        with suppress(ProcessLookupError, PermissionError):  # ended just now
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Kill the rank if it still runs, and wait for its end."""
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
        self._process.wait()
        self._watcher.join()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


class _Launch:
    """The ranks of one run."""

    def __init__(
        self,
        commands: Sequence[RankCommand],
        report: Callable[[str], None],
        show: Callable[[str], None],
    ) -> None:
        self._commands, self._report, self._show = commands, report, show
        self._events: SimpleQueue[Any] = SimpleQueue()  # (rank, status), or the number of a signal
        self._ranks: list[_Rank] = []
        self._failed: list[_Rank] = []  # in the order in which they ended
        self._stops: list[int] = []  # signals to this process
        self._deadline: float | None = None
        self._next_signal: int = signal.SIGTERM
        self._cleanup = ExitStack()

    def __enter__(self) -> "_Launch":
        try:
            for wanted in STOP_SIGNALS:
                # `nohup` ignores SIGHUP; shells ignore SIGINT in background programs, and a single
                # process of training handles it there.
                if wanted != signal.SIGHUP or signal.getsignal(wanted) is not signal.SIG_IGN:
                    handler = signal.signal(wanted, lambda got, frame: self._events.put(got))
                    self._cleanup.callback(signal.signal, wanted, handler)
            for number, command in enumerate(self._commands):
                self._ranks.append(_Rank(number, command, self._events, self._show))
                self._cleanup.callback(self._ranks[-1].close)
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()

    def wait(self) -> int:
        """Wait until all ranks have ended; return the exit code of the run."""
        while any(rank.status is None for rank in self._ranks):
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            try:
                event = self._events.get(timeout=left)
            except Empty:
                self._end_survivors()
                continue
            if isinstance(event, tuple):
                self._note_end(*event)
            else:
                self._stop(event)
        if len(self._stops) > 1:
            return 128 + self._stops[-1]
        if self._failed:
            self._report_failure()
        return self._exit_code()

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.status is None]

    def _stop(self, number: int) -> None:
        """Ask all ranks to stop after the same step; kill them at the second signal."""
        self._stops.append(number)
        for rank in self._running():
            if len(self._stops) == 1:
                rank.send(f"{STOP} {number:d}")
            else:
                rank.signal(signal.SIGKILL)

    def _note_end(self, rank: _Rank, status: int) -> None:
        rank.status = status
        for other in self._running():
            other.send(f"{ENDED} {rank.number} {status}")
        # Before the first step, a rank ends by SIGTERM as any program does.
        was_stopped = status in STOPPED or (self._stops and -status in STOP_SIGNALS)
        if status != 0 and not was_stopped:
            self._failed.append(rank)
            self._set_deadline(GRACE_SECONDS)
        elif rank.number == 0 and status == 0:
            self._set_deadline(FINISH_SECONDS)

    def _set_deadline(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _end_survivors(self) -> None:
        """Send SIGTERM to the ranks that still run; SIGKILL the next time."""
        for rank in self._running():
            rank.signal(self._next_signal)
        self._next_signal, self._deadline = signal.SIGKILL, time.monotonic() + GRACE_SECONDS

    def _exit_code(self) -> int:
        by_themselves = [rank for rank in self._failed if not rank.was_ended]
        own = [rank for rank in by_themselves if not rank.is_lost]
        for rank in [*own, *by_themselves, *self._failed, *self._ranks]:
            if rank.status:
                # A rank that could not connect ends by SIGALRM, see `connect.py`.
                status = LOST if rank.status == -signal.SIGALRM else rank.status
                return status if status > 0 else 128 - status
        return 0

    def _report_failure(self) -> None:
        """Report what rank 0 could not: its own end by a signal, a crash, output of the others."""
        first, main = self._failed[0], self._ranks[0]
        assert main.status is not None
        others = [rank for rank in self._failed if rank is not main and not rank.was_ended]
        has_reported = main.status > 0 and not main.was_ended
        for rank in others:
            if not rank.is_lost and rank.tail and (rank.has_crashed or not has_reported):
                self._report("\n".join(f"{rank.name}: {line}" for line in rank.tail))
        # The first of the ranks that ended because rank 0 was lost has a line about it.
        lost = [line for rank in others if rank.is_lost for line in rank.tail]
        if lines := [line for line in lost if line.startswith(ERROR)]:
            self._report(lines[-1].removeprefix(ERROR))
        elif not has_reported:
            event = describe_end(first.status)
            if first.status == -signal.SIGALRM:
                event = "could not connect to the other ranks within --rank-timeout"
            self._report(f"{first.name} {event}; resume with --resume")


@contextmanager
def ring_on_this_machine(count: int) -> Iterator[list[dict[str, str]]]:
    """Yield the variables of each rank of a ring on this machine, by free ports of loopback.

    Each rank gets an equal share of the cores, unless OPENBLAS_NUM_THREADS is set.
    """
    with ExitStack() as open_sockets:
        sockets = [
            open_sockets.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)
        ]
        addresses = [[f"{LOOPBACK}:{server.getsockname()[1]}"] for server in sockets]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    with tempfile.TemporaryDirectory(prefix="mlx-dpo-") as folder:
        hostfile = Path(folder) / "ring.json"
        hostfile.write_text(json.dumps(addresses), encoding="utf-8")
        yield [
            {
                RANK: str(rank),
                "MLX_HOSTFILE": str(hostfile),
                BLAS_THREADS: os.environ.get(BLAS_THREADS, threads),
            }
            for rank in range(count)
        ]
