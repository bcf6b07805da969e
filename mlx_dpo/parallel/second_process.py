"""A second process for every other pass on the CPU, forked from this one.

MLX's CPU backend does most of its work on one thread: OpenBLAS divides a matrix product over the
cores, but its threads wait for each other and for all that lies between two products. Two passes at
once, with half of the threads each, use the cores better. They are in two processes because in one
they would block each other: MLX hands out no further work while more than ten tasks of any stream
wait. A fork shares the memory of the weights, which neither process writes to.

A pass has the same numbers in both processes, so that results do not depend on timing.
"""

import atexit
import ctypes
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import mlx.core as mx

from mlx_dpo.errors import TrainingError, reason
from mlx_dpo.startup import openblas

PASSES_AT_ONCE = 2
STALL_SECONDS = 60.0  # a process that uses no CPU time for so long is stuck
# A terminal, `timeout` or systemd sends them to both processes.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # prctl: the signal that this process gets when the thread that forked it ends
WATCH_SECONDS = 0.2  # between two looks at the parent, where a thread forked that may end earlier

_extra_bytes = 0  # largest memory that a second process needed beyond what it shares


def can_compute_two_passes() -> bool:
    """Return whether two passes at once are possible, and faster than one after the other.

    They are on Linux, on the CPU, where OpenBLAS may use two threads or more. With
    OPENBLAS_NUM_THREADS=1 passes are computed one after the other, and in a worker of a
    `multiprocessing.Pool` or another daemon as well, because daemons may have no children.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return False
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return on_cpu and openblas.num_threads() >= PASSES_AT_ONCE


class SecondProcess:
    """A fork of this process that answers questions while this process computes, too.

    Attributes:
        answer: function that runs in the second process: takes a question and yields replies.
    """

    def __init__(self, answer: Callable[[Any], Iterable[Any]]) -> None:
        """Set the function; the process begins with the first question."""
        self.answer = answer
        self._process: Any = None
        self._received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process, whatever it computes."""
        if self._process is None:
            return
        atexit.unregister(self._process.kill)
        self._process.kill()
        self._process.join()
        self._reader.join()
        self._connection.close()

    @property
    def is_running(self) -> bool:
        """Whether the process was forked already."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Number of the process; None before its first question."""
        return None if self._process is None else self._process.pid

    @contextmanager
    def sharing_cores(self) -> Iterator[None]:
        """Give OpenBLAS half of its threads inside the block, and all of them afterwards."""
        count = openblas.num_threads()
        openblas.set_num_threads(max(1, count // PASSES_AT_ONCE))
        try:
            yield
        finally:
            openblas.set_num_threads(count)

    def ask(self, question: Any) -> None:
        """Send a question; `receive` returns the replies in their order.

        Ask inside `sharing_cores`: the process keeps the number of OpenBLAS threads with which it
        was forked, at the first question. It has what this process then has in memory; all arrays
        that it needs must have been evaluated, because their stream stays in this process.

        Raises:
            TrainingError: the process ended after its last reply, or cannot begin.
        """
        if self._process is None:
            self._fork()
        try:
            self._connection.send_bytes(pickle.dumps(question))
        except ConnectionError as error:
            raise self._end_error() from error

    def receive(self) -> Any:
        """Return the next reply.

        Raises:
            TrainingError: the process ended, as when memory runs out, or it stands still.
            Exception: what `answer` raised.
        """
        global _extra_bytes
        received = self._next_message()
        if received is None:
            raise self._end_error()
        error, reply, extra_bytes = pickle.loads(received)
        if error is not None:
            raise error
        _extra_bytes = max(_extra_bytes, extra_bytes)
        return reply

    def _end_error(self) -> TrainingError:
        """Return the error of a process that ended although it was needed."""
        self._process.join()
        return TrainingError(
            f"the second process of the run ended (exit code {self._process.exitcode}); "
            "if memory ran out, use OPENBLAS_NUM_THREADS=1, with which there is none"
        )

    def _next_message(self) -> bytes | None:
        """Wait for a message; None if the process ended.

        Raises:
            TrainingError: the process waits for something that will not come.
        """
        before = None
        while True:
            with suppress(queue.Empty):
                return self._received.get(timeout=STALL_SECONDS)
            if before == (before := _cpu_ticks(self._process.pid)):
                raise TrainingError(
                    f"the second process of the run (pid {self._process.pid}) does not compute; "
                    "use OPENBLAS_NUM_THREADS=1, with which there is none"
                )

    def _fork(self) -> None:
        mx.synchronize()  # a thread of MLX that worked now would be missing in the fork
        self._connection, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        parent = Parent(os.getpid(), threading.current_thread() is threading.main_thread())
        arguments = (self.answer, theirs, self._connection, parent)
        process = fork.Process(target=_serve, args=arguments, daemon=True)
        with theirs, warnings.catch_warnings():  # Python 3.12 warns if there are threads
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                process.start()
            except OSError as error:  # too many processes, or too little memory to promise
                self._connection.close()
                raise TrainingError(
                    f"the second process of the run cannot begin ({reason(error)}); "
                    "use OPENBLAS_NUM_THREADS=1, with which there is none"
                ) from error
        self._process = process
        # Python asks daemons to end by a signal that this one ignores, and waits for them.
        atexit.register(process.kill)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Take all replies out of the pipe, so that the process never waits to send one."""
        try:
            while True:
                self._received.put(self._connection.recv_bytes())
        except (EOFError, OSError):  # the process ended
            self._received.put(None)


def reset_peak_memory() -> None:
    """Begin to measure the peak of memory again, in this process and later second ones."""
    global _extra_bytes
    _extra_bytes = 0
    mx.reset_peak_memory()


def peak_memory() -> int:
    """Return the peak of MLX's memory in bytes, with that of a second process."""
    return mx.get_peak_memory() + _extra_bytes


class Parent(NamedTuple):
    """The process that forked, and whether its main thread did."""

    pid: int
    by_main_thread: bool

    def is_alive(self) -> bool:
        """Return whether this process, its child, still has this parent."""
        return os.getppid() == self.pid

    def end_with(self) -> None:
        """Let this process, its child, be killed when the parent ends."""
        if self.by_main_thread:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        else:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.is_alive():
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def _serve(
    answer: Callable[[Any], Iterable[Any]],
    connection: Connection,
    theirs: Connection,
    parent: Parent,
) -> None:
    """Answer questions until the connection closes; runs in the second process."""
    theirs.close()
    for number in ENDING_SIGNALS:  # they are for the first process, which ends this one
        signal.signal(number, signal.SIG_IGN)
    parent.end_with()
    shared = mx.get_active_memory()
    mx.reset_peak_memory()

    def reply_to(question: bytes) -> None:
        for reply in answer(pickle.loads(question)):
            content = (None, reply, mx.get_peak_memory() - shared)
            connection.send_bytes(pickle.dumps(content))

    # MLX's streams belong to the thread that made them; those of this one stayed in the first
    # process, where work for them would wait for ever.
    with ThreadPoolExecutor(1, initializer=_use_new_stream) as executor:
        while parent.is_alive():
            try:
                question = connection.recv_bytes()
            except EOFError:
                return
            error = executor.submit(reply_to, question).exception()
            if error is not None:
                connection.send_bytes(pickle.dumps((error, None, 0)))


def _cpu_ticks(pid: int) -> int | None:
    """Return the CPU time that a process has used, in clock ticks; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    return int(fields[11]) + int(fields[12])  # utime and stime, proc(5)


def _use_new_stream() -> None:
    mx.set_default_stream(mx.new_stream(mx.cpu))
