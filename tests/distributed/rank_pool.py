"""Processes that are ranks of one group and run calls, one after the other, for many tests.

    with RankPool(3, folder) as pool:
        replies = pool.call("train", settings={...})  # one reply per rank

The functions that can be called stand in `rank_worker.py`. No process outlives the pool: each is
the leader of a session that is killed when the pool closes, and ends by itself when its standard
input does, which covers a killed pytest.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "tests.distributed.rank_worker"]
# Variables of a launcher around the tests.
LAUNCHER_VARIABLES = ("MLX_RANK", "MLX_HOSTFILE", "MLX_DPO_RANK")
STARTS = 3  # tries: another program may take a port between its choice and its use
CALL_SECONDS = 240


class LostRankError(Exception):
    """A rank of a pool ended, or did not reply."""


def write_hostfile(path, count):
    """Write MLX's hostfile of `count` ranks on this machine, on ports that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    path.write_text(json.dumps(hosts))
    return path


def environment(**variables):
    """Return the environment of a rank: this one without a launcher's variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def kill_session(process):
    """Kill a process that leads a session, and all processes of its group; wait for its end."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class RankPool:
    """`count` processes, which are ranks of one group if they are several. They start lazily."""

    def __init__(self, count, folder):
        self.count = count
        self.folder = folder
        self.processes = []
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Kill all processes. The next call starts new ones."""
        processes, self.processes = self.processes, []
        for process in processes:
            kill_session(process)
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    stream.close()

    def call(self, name, each=None, **arguments):
        """Return one reply per rank: `{"value": ...}`, `{"error": ...}` or `{"traceback": ...}`.

        Args:
            name: function of `rank_worker.py`.
            each: further arguments, one dictionary per rank.
            arguments: arguments of the function on every rank.
        """
        if any(process.poll() is not None for process in self.processes):
            self.close()  # ranks that have been idle for long end themselves
        if not self.processes:
            self._start()
        for rank, process in enumerate(self.processes):
            own = arguments | (each[rank] if each else {})
            line = json.dumps({"name": name, "arguments": own}) + "\n"
            process.stdin.write(line.encode())
            process.stdin.flush()
        try:
            replies = [self._receive(rank) for rank in range(self.count)]
        except BaseException:
            self.close()
            raise
        if any("value" not in reply for reply in replies):
            self.close()  # the ranks may be at different operations
        return replies

    def values(self, name, each=None, **arguments):
        """Return the value of each rank. An error of a rank fails the test."""
        replies = self.call(name, each, **arguments)
        failures = [f"rank {n}: {r}" for n, r in enumerate(replies) if "value" not in r]
        assert not failures, "\n".join(failures)
        return [reply["value"] for reply in replies]

    def _start(self):
        for attempt in range(STARTS):
            hostfile = write_hostfile(self.folder / "hosts.json", self.count)
            for rank in range(self.count):
                variables = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
                with (self.folder / f"rank-{rank}.txt").open("ab") as errors:
                    process = subprocess.Popen(
                        WORKER,
                        env=environment(**variables if self.count > 1 else {}),
                        cwd=ROOT,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        start_new_session=True,
                    )
                self.processes.append(process)
            try:
                for rank in range(self.count):
                    self._receive(rank)
            except LostRankError:
                self.close()
                if attempt == STARTS - 1:
                    raise
            else:
                return

    def _receive(self, rank):
        """Return the next reply of a rank."""
        stream = self.processes[rank].stdout
        line, end = b"", time.monotonic() + CALL_SECONDS
        while not line.endswith(b"\n"):
            ready = select.select([stream], [], [], max(0, end - time.monotonic()))[0]
            part = os.read(stream.fileno(), 2**16) if ready else b""
            if not part:
                what = "ended" if ready else f"has not replied for {CALL_SECONDS} s"
                raise LostRankError(f"rank {rank} of {self.count} {what}; it wrote:{self.errors()}")
            line += part
        return json.loads(line)

    def errors(self):
        """Return the last lines that the ranks have written to standard error."""
        texts = [(self.folder / f"rank-{rank}.txt").read_text() for rank in range(self.count)]
        return "".join(f"\n[{rank}] {text[-1500:]}" for rank, text in enumerate(texts))
