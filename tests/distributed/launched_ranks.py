"""A launcher and its ranks in processes of their own, none of which outlives a test."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHER_PROGRAM = """
import sys
from mlx_dpo.distributed import launch
grace, count, *argv = sys.argv[1:]
launch.GRACE_SECONDS = float(grace)
with launch.ring_on_this_machine(int(count)) as variables:
    commands = [launch.RankCommand("studio", tuple(argv), each) for each in variables]
    sys.exit(launch.launch(commands, lambda text: print(text, file=sys.stderr)))
"""


class Launcher:
    """A launcher of ranks that run a program; the program writes its pid to FOLDER/pid-RANK.

    All of them are killed at the end.

    Args:
        grace: seconds until the launcher ends the ranks that survive a failure, in two attempts.
    """

    def __init__(self, folder, count, program, *plans, grace=5.0, **variables):
        self.folder, self.count = folder, count
        rank = [sys.executable, "-c", program, str(folder), *plans]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER_PROGRAM, str(grace), str(count), *rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pid(self, rank):
        return int((self.folder / f"pid-{rank}").read_text())

    def pids(self):
        return [int(path.read_text()) for path in self.folder.glob("pid-*")]

    def until_all_run(self):
        deadline = time.monotonic() + 30
        while len(self.pids()) < self.count:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def result(self):
        output, errors = self.process.communicate(timeout=60)
        assert alive(self.pids()) == []
        return self.process.returncode, output, errors


def alive(pids):
    return [pid for pid in pids if is_running(pid)]


def is_running(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
