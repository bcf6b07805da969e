"""A run that the product's own launcher starts over several ranks, and what is left of it.

Linux only: the processes are found by their environment, in /proc.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from tests.distributed.rank_pool import environment, kill_session
from tests.distributed.run_cases import full_settings

PROGRAM = [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "train"]
TOKEN = "MLX_DPO_TESTED_RUN"  # variable that all processes of a run inherit


def to_flags(settings):
    """Return the words of a command line for settings of a run."""
    words = list(settings["pairs"])
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if name == "pairs":
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    return words


class LaunchedRun:
    """`mlx-dpo train --ranks N` as a process; all of its processes are killed by `close`."""

    def __init__(self, count, inputs, output, changes, *words, cache):
        self.count = count
        self.output = output
        self.token = token_hex(8)
        self.began = time.monotonic()
        self.rows_before = 0  # of metrics, when this start began
        settings = full_settings(inputs, changes, output.name)
        ranks = ["--ranks", str(count)] if count > 1 else []
        output.parent.mkdir(parents=True, exist_ok=True)
        self.log = Path(f"{output}.txt")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, *to_flags(settings), *ranks, *words],
                env=environment(
                    **{TOKEN: self.token, "MLX_DPO_CACHE": str(cache), "MLX_DPO_STATUS": "1"}
                ),
                cwd=output.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Kill all processes of the run, those that outlived the launcher as well."""
        kill_session(self.process)
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self):
        """Return the rank (None: the launcher's) and the parent of the run's processes, by id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # it has ended, or is another user's
                continue
            if state not in "ZX" and f"{TOKEN}={self.token}" in entries:
                ranks = [e.partition("=")[2] for e in entries if e.startswith("MLX_RANK=")]
                found[int(folder.name)] = (int(ranks[0]) if ranks else None, int(parent))
        return found

    def rank_pid(self, rank):
        """Return the process id of a rank, not of its children; None if it does not run."""
        pids = {pid: parent for pid, (r, parent) in self.processes().items() if r == rank}
        return next((pid for pid, parent in pids.items() if parent not in pids), None)

    def send(self, rank, number):
        """Send a signal to a rank; returns whether it was running."""
        if (pid := self.rank_pid(rank)) is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def wait_for_ranks(self):
        """Wait until all ranks exist. Returns whether they do: the run may have ended."""
        return self.wait_until(
            lambda: all(self.rank_pid(rank) for rank in range(self.count)), every=0.02
        )

    def wait_until(self, is_due, every=0.002, limit=120.0):
        """Wait until `is_due` returns true. Returns False if the run ended before."""
        end = time.monotonic() + limit
        while not is_due():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, f"the moment never came:\n{self.text()}"
            time.sleep(every)
        return True

    def wait_for_end(self, limit):
        """Wait until no process of the run is left; returns whether it came to that."""
        end = time.monotonic() + limit
        while self.processes():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def age(self):
        """Return the seconds since the start."""
        return time.monotonic() - self.began

    def end(self, limit):
        """Wait for the end of the launcher and its ranks; return (exit code, seconds).

        Fails if the launcher runs for more than `limit` seconds, or leaves a process.
        """
        began = time.monotonic()
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"not ended after {limit} s; running (rank, parent): {self.processes()}\n"
                f"{self.text()}"
            ) from None
        seconds = time.monotonic() - began
        left = self.processes()
        assert left == {}, f"processes (rank, parent) outlived the launcher: {left}\n{self.text()}"
        return code, seconds

    def text(self):
        """Return what the run has printed so far."""
        return self.log.read_text(errors="replace")

    def rows(self):
        """Return the number of rows in the metrics file."""
        with suppress(FileNotFoundError):
            return (self.output / "metrics.jsonl").read_bytes().count(b"\n")
        return 0
