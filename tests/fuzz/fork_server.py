"""Start commands quickly: a process that has imported everything forks one for each command.

A line of JSON on stdin starts a command; a line of JSON on stdout tells how it ended. The command
is killed with SIGKILL at a moment of the clock, or before a change of the file system: opening a
file to write, renaming, removing, making a folder.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.watchdog import child_environment

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OUTSIDE = ("/dev/null", "/dev/tty", "/dev/fd", "/dev/urandom", "/proc", "/sys")
LIMIT = 120.0  # seconds after which a command is said to hang


class Ended(NamedTuple):
    """How a command ended: its status (negative: a signal), duration, changes and output."""

    status: int
    seconds: float
    changes: int  # of the file system; known only if the command was not killed
    output: str

    @property
    def killed(self) -> bool:
        """Whether the command was killed."""
        return self.status == -signal.SIGKILL


class ForkServer:
    """A process that forks the commands of one test module."""

    def __init__(self) -> None:
        """Start the process; the first command waits for its imports."""
        words = [sys.executable, "-m", "tests.fuzz.fork_server"]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment()
        )

    def run(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        after: float | None = None,
        before: int | None = None,
    ) -> Ended:
        """Run a command in a folder to its end, or kill it.

        Args:
            words: command line.
            folder: its current folder; the cache is in it.
            after: seconds after which it is killed.
            before: number of the change of the file system before which it is killed, from 1.
        """
        request = {"words": list(words), "folder": str(folder), "after": after, "before": before}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve() -> None:
    """Answer requests until stdin ends."""
    import_everything()
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))._asdict()), flush=True)


def import_everything() -> None:
    """Import all that commands import; no array may be computed, for that would start threads."""
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import transformers  # noqa: F401

    import mlx_dpo.cli as commands
    import mlx_dpo.collect.iterative.trainer
    import mlx_dpo.export.fuse
    import mlx_dpo.runs.trainer
    import mlx_dpo.saved_runs.report  # noqa: F401

    for name in commands.COMMANDS:
        commands.cli.get_command(None, name)


def _run(request: dict[str, Any]) -> Ended:
    after = request["after"]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as counter:
        began = time.monotonic()
        process = os.fork()
        if not process:
            _become_command(request, output.fileno(), counter.fileno())
        status = None
        while status is None:
            elapsed = time.monotonic() - began
            if elapsed > (LIMIT if after is None else after):
                os.kill(process, signal.SIGKILL)
            ended, code = os.waitpid(process, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
            time.sleep(0.001)
        seconds = time.monotonic() - began
        for stream in (output, counter):
            stream.seek(0)
        text = output.read().decode("utf-8", "replace")
        return Ended(status, seconds, len(counter.read()), text)


def _become_command(request: dict[str, Any], output: int, counter: int) -> None:
    """Run the command in this (forked) process, which ends with it."""
    from mlx_dpo.cli import main

    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["folder"])
    os.environ["MLX_DPO_CACHE"] = "cache"
    sys.argv = ["mlx-dpo", *request["words"]]
    _watch_changes(counter, request["before"])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch_changes(counter: int, before: int | None) -> None:
    """Write a byte for each change of the file system, and die before the chosen one."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if not _is_change(event, arguments):
            return
        count += 1
        os.write(counter, b".")
        if count == before:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & WRITING or isinstance(path, int):
            return False
    elif event not in CHANGES:
        return False
    return not os.fsdecode(arguments[0]).startswith(OUTSIDE)


if __name__ == "__main__":
    serve()
