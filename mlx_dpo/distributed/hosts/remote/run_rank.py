"""Run a rank on this machine for a launcher on another one, and end it with the connection.

This program is sent as text and started by ssh. Its standard input is the pipe of the launcher. At
the end of the pipe, also when the launcher or the connection is lost, no process of the rank stays.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import Any

GRACE_SECONDS = 5.0  # for the rank to end by itself after the end of the pipe
STANDARD_INPUT = 0


def run_rank(request: dict[str, Any]) -> int:
    """Run the rank; return its exit code, or 128 plus the number of the signal that ended it.

    Args:
        request: `folder`, the working folder; `argv`; `environment`, variables by name;
            `files`, texts by the variables that name their files.
    """
    os.chdir(os.path.expanduser(request["folder"]))
    with tempfile.TemporaryDirectory(prefix="mlx-dpo-") as temporary:
        environment = dict(os.environ) | request["environment"]
        for variable, text in request["files"].items():
            environment[variable] = os.path.join(temporary, variable)
            with open(environment[variable], "w", encoding="utf-8") as file:
                file.write(text)
        program, *arguments = request["argv"]
        argv = [os.path.expanduser(program), *arguments]
        try:
            rank = subprocess.Popen(
                argv, env=environment, stdin=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            sys.stderr.write(f"{argv[0]}: cannot be started ({error.strerror})\n")
            return 127
        return supervise(rank)


def supervise(rank: subprocess.Popen[bytes]) -> int:
    """Pass lines on to the rank until it ends; return its exit code as of `run_rank`."""

    def kill_rank(number: int = 0, frame: object = None) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: it has ended
            os.killpg(rank.pid, signal.SIGKILL)

    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, kill_rank)
    threading.Thread(target=pass_on_input, args=(rank, kill_rank), daemon=True).start()
    status = rank.wait()
    kill_rank()  # what it started and left
    return status if status >= 0 else 128 - status


def pass_on_input(rank: subprocess.Popen[bytes], kill_rank: Any) -> None:
    """Write what comes on standard input to the rank; at its end, give the rank time to end."""
    assert rank.stdin is not None
    with suppress(BrokenPipeError):
        while content := os.read(STANDARD_INPUT, 4096):
            rank.stdin.write(content)
            rank.stdin.flush()
    with suppress(BrokenPipeError):
        rank.stdin.close()
    try:
        rank.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        kill_rank()


if __name__ == "__main__":
    sys.exit(run_rank(json.loads(base64.b64decode(sys.argv[-1]))))
