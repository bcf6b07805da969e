"""The launcher as one of its ranks sees it: lines on standard input.

Our launcher keeps a pipe open to the standard input of each rank, also through `ssh`. It writes

    stop NUMBER         a signal that asks to save and stop, as for a single process
    ended RANK STATUS   another rank ended; a negative status is minus the signal that killed it

The end of the pipe means that the launcher is gone, even by `kill -9`, and the rank ends itself.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, MutableMapping
from contextlib import suppress

LAUNCHED = "MLX_DPO_LAUNCHED"  # set to 1 for each rank by our launcher
# Number of the open file to which rank 0 writes what C++ code writes to standard error.
NATIVE_OUTPUT = "MLX_DPO_NATIVE_OUTPUT"
STOP, ENDED = "stop", "ended"
# Exit status of a rank that ends because another one was lost: EX_TEMPFAIL of sysexits(3), a
# failure after which it is worth to try again.
LOST = 75
STANDARD_INPUT, STANDARD_ERROR = 0, 2

stops: list[int] = []  # signals by which the launcher stopped this rank
ended_ranks: dict[int, int] = {}  # exit status by rank, as far as the launcher has reported them
_watches = threading.Lock()  # held from the first call of `obey_launcher` on


def _end_at_once() -> None:
    os._exit(LOST)


_on_gone: Callable[[], None] = _end_at_once


def is_launched() -> bool:
    """Return whether our launcher started this process."""
    return os.environ.get(LAUNCHED) == "1"


def divert_native_output() -> None:
    """Send what C++ code writes to standard error to the launcher, which drops noise of the ring.

    Python's `sys.stderr` keeps the terminal. Does nothing without a launcher on this machine.
    """
    number = os.environ.pop(NATIVE_OUTPUT, None)
    if number is not None:
        terminal, encoding = os.dup(STANDARD_ERROR), sys.stderr.encoding
        sys.stderr = os.fdopen(terminal, "w", 1, encoding=encoding, errors="backslashreplace")
        os.dup2(int(number), STANDARD_ERROR)
        os.close(int(number))


def obey_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Read the lines of our launcher from now on, in a thread; does nothing without a launcher.

    Call it as early as possible: it is what ends this process when the launcher is killed.
    """
    if environment.get(LAUNCHED) == "1" and _watches.acquire(blocking=False):
        threading.Thread(target=_read_lines, name="launcher", daemon=True).start()


def call_when_gone(function: Callable[[], None]) -> None:
    """Set the function that is called when the launcher is gone; by default the process ends."""
    global _on_gone
    _on_gone = function


def _read_lines() -> None:
    rest = b""
    while content := os.read(STANDARD_INPUT, 4096):
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            _obey(line.decode().split())
    _on_gone()


def _obey(words: list[str]) -> None:
    match words:
        case ["stop", *number]:
            stops.append(int(number[0]) if number else signal.SIGINT)
            signal_main_thread(stops[-1])
        case ["ended", rank, status]:
            ended_ranks[int(rank)] = int(status)


def signal_main_thread(number: int) -> None:
    """Send a signal to the main thread, whose system calls it interrupts."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, number)


def describe_end(status: int | None) -> str:
    """Return in words how a process ended, by its status as of `subprocess`."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended (exit code {status})"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"
