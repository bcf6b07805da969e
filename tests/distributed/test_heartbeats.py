"""Ranks that gather until one of them is lost: all end, with one line that names the rank.

The ranks are small programs that connect over MLX's ring, started by the launcher.
"""

import os
import re
import signal
import socket
import time

import pytest

from tests.distributed.launched_ranks import Launcher

# It gathers until step 6 of the rank that the plan names, RANK=WHAT.
RANK_PROGRAM = """
import logging, os, signal, sys, time
import mlx_dpo
from mlx_dpo.distributed import heartbeats, lost_ranks
from mlx_dpo.distributed.connect import connect
from mlx_dpo.distributed.launcher_pipe import divert_native_output
divert_native_output()
logging.basicConfig(format="Error: %(message)s")
folder, *plans = sys.argv[1:]
ranks = connect()
mine = dict(word.split("=") for word in plans).get(str(ranks.rank), "wait")
is_short = "0=end" in plans
if any("hang" in plan for plan in plans):
    lost_ranks.STALL_FACTOR = 0.4
with open(f"{folder}/new-{ranks.rank}", "w") as file:
    file.write(str(os.getpid()))
os.rename(f"{folder}/new-{ranks.rank}", f"{folder}/pid-{ranks.rank}")
if ranks.is_main:
    heartbeats.note(checkpoint="run/step-4", command="go on")
def fail(what):
    if what == "raise":
        raise ValueError("boom")
    if what == "exit":
        sys.exit(3)
    if what == "vanish":
        os._exit(4)
    if what == "report":
        heartbeats.report_error("pairs.jsonl: bad row; fix it")
        time.sleep(1)  # a busy machine
        print("Error: pairs.jsonl: bad row; fix it", file=sys.stderr)
        sys.exit(1)
    if what == "hang":
        time.sleep(300)
    if what.isdigit():
        os.kill(os.getpid(), int(what))
for step in range(1, 10**6):
    heartbeats.note(step=step)
    if step == 6:
        fail(mine)
        if is_short:
            break
    ranks.all_gather_json("step", step)
    time.sleep(0.02)
"""
KILL, STOP = f"{signal.SIGKILL:d}", f"{signal.SIGSTOP:d}"
HOST = socket.gethostname()
ADVICE = "; last checkpoint: run/step-4; resume with: go on"


def lose(folder, count, *plans, timeout=30):
    """Start ranks, and return exit code and error lines after all have ended."""
    variables = {"MLX_DPO_RANK_TIMEOUT": str(timeout), "OPENBLAS_NUM_THREADS": "1"}
    with Launcher(folder, count, RANK_PROGRAM, *plans, **variables) as launcher:
        code, _, errors = launcher.result()
    return code, [line for line in errors.splitlines() if line]


def lines_of(rank, event):
    """Return a pattern of the single line about a lost rank; rank 0 prints it as `Error: `."""
    return rf"(Error: )?rank {rank} \({HOST}\) {event} after step \d+{re.escape(ADVICE)}"


def check_single_line(lines, pattern):
    assert len(lines) == 1, lines
    assert re.fullmatch(pattern, lines[0]), lines


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all(tmp_path, rank):
    code, lines = lose(tmp_path, 2, f"{rank}={KILL}")
    assert code == 137
    check_single_line(lines, lines_of(rank, "was killed by SIGKILL"))


def test_an_error_of_another_rank_is_printed_once(tmp_path):
    code, lines = lose(tmp_path, 2, "1=report")
    assert code == 1
    check_single_line(
        lines, rf"Error: rank 1 \({HOST}\): pairs.jsonl: bad row; fix it{re.escape(ADVICE)}"
    )


def test_rank_0_prints_its_error_after_the_others_have_ended(tmp_path):
    code, lines = lose(tmp_path, 2, "0=report")
    assert (code, lines) == (1, ["Error: pairs.jsonl: bad row; fix it"])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("what", "code", "event"),
    [
        (KILL, 137, "was killed by SIGKILL"),
        (STOP, 75, r"has been silent for \d+ s"),
        ("vanish", 4, r"ended \(exit code 4\)"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_can_be_lost(tmp_path, count, what, code, event, rank):
    if rank < count:
        timeout = 8 if what == STOP else 30
        returned, lines = lose(tmp_path, count, f"{rank}={what}", timeout=timeout)
        assert returned == code
        check_single_line(lines, lines_of(rank, event))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_ends_too_early_is_named(tmp_path, count, rank):
    if rank < count:
        code, lines = lose(tmp_path, count, f"{rank}=exit")
        assert code == 3
        check_single_line(lines, lines_of(rank, r"ended \(exit code 3\) before the others"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_crash_of_another_rank_has_its_traceback(tmp_path, count):
    code, lines = lose(tmp_path, count, "1=raise")
    assert code == 1
    assert lines[0] == f"Error: rank 1 ({HOST}): ValueError: boom{ADVICE}"
    assert all(line.startswith("rank 1 (studio): ") for line in lines[1:])
    assert lines[-1] == "rank 1 (studio): ValueError: boom"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_all(tmp_path, count, rank):
    """Its heartbeats go on, but it makes no progress."""
    code, lines = lose(tmp_path, count, f"{rank}=hang", timeout=12)
    assert code == 75
    check_single_line(lines, lines_of(rank, r"has made no progress for \d+ s"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_that_end_together_end_normally(tmp_path, count):
    assert lose(tmp_path, count, "0=end") == (0, [])


@pytest.mark.slow
def test_a_suspended_rank_ends_when_it_wakes_up(tmp_path):
    """The others are gone then; here without a launcher that would kill it."""
    with Launcher(tmp_path, 2, RANK_PROGRAM, MLX_DPO_RANK_TIMEOUT="20") as launcher:
        suspended, other = launcher.until_all_run().pid(1), launcher.pid(0)
        os.kill(suspended, signal.SIGSTOP)
        launcher.process.kill()  # rank 0 ends, because its launcher is gone
        wait_for_end(other)
        os.kill(suspended, signal.SIGCONT)
        wait_for_end(suspended)


def wait_for_end(pid):
    deadline = time.monotonic() + 20
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_that_does_not_connect_ends_all(tmp_path):
    program = RANK_PROGRAM.replace("ranks = connect()", "time.sleep(300 * int(os.environ['MLX_RANK'])); ranks = connect()")  # fmt: skip # noqa: E501
    with Launcher(tmp_path, 2, program, MLX_DPO_RANK_TIMEOUT="2") as launcher:
        code, _, errors = launcher.result()
    assert code == 75
    assert errors.splitlines() == [
        "rank 0 (studio) could not connect to the other ranks within --rank-timeout; resume with "
        "--resume"
    ]
