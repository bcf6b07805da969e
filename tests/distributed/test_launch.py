"""The launcher: exit codes, messages, signals, and that no rank outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_dpo.distributed.launch import RankCommand, launch, ring_on_this_machine
from mlx_dpo.distributed.launcher_pipe import describe_end
from mlx_dpo.errors import DPOError
from tests.distributed.launched_ranks import Launcher, alive

# A rank without MLX: it writes its pid to FOLDER/pid-RANK, then does what RANK=WHAT asks of it.
RANK_PROGRAM = """
import os, signal, sys, time
from mlx_dpo.distributed.launcher_pipe import obey_launcher
folder, *plans = sys.argv[1:]
rank = os.environ["MLX_RANK"]
plan = dict(word.split("=") for word in plans).get(rank, "wait")
def save_and_stop(number, frame):
    print("rank", rank, "stops", flush=True)
    time.sleep(0.2)
    sys.exit(128 + number)
if plan == "plain":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
elif plan != "deaf":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, save_and_stop)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
obey_launcher()
with open(f"{folder}/new-{rank}", "w") as file:
    file.write(str(os.getpid()))
os.rename(f"{folder}/new-{rank}", f"{folder}/pid-{rank}")
if plan == "raise":
    raise ValueError("boom")
if plan == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if plan.isdigit():
    print("last words", flush=True)
    sys.exit(int(plan))
time.sleep(300)
"""


@pytest.mark.parametrize(
    ("plans", "code", "expected"),
    [
        (["0=0", "1=0"], 0, []),
        (["1=3"], 3, ["rank 1 (studio): last words", "rank 1 (studio) ended (exit code 3)"]),
        (["0=4"], 4, []),  # rank 0 has printed its own error
        (["1=kill"], 137, ["rank 1 (studio) was killed by SIGKILL"]),
        (["0=kill"], 137, ["rank 0 (studio) was killed by SIGKILL"]),
        (["1=raise"], 1, ["rank 1 (studio): ValueError: boom"]),
        (["0=deaf", "1=7"], 7, ["rank 1 (studio) ended (exit code 7)"]),
    ],
)
def test_the_exit_code_is_that_of_the_first_rank_that_fails(tmp_path, plans, code, expected):
    with Launcher(tmp_path, 2, RANK_PROGRAM, *plans, grace=0.5) as launcher:
        returned, _, errors = launcher.result()
    assert returned == code
    assert all(text in errors for text in expected), errors
    assert bool(errors) == bool(expected)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_ranks(tmp_path, number, code):
    with Launcher(tmp_path, 2, RANK_PROGRAM) as launcher:
        launcher.until_all_run().process.send_signal(number)
        returned, output, errors = launcher.result()
    assert (returned, output, errors) == (code, "rank 0 stops\n", "")


def test_ranks_that_end_by_the_signal_have_not_failed(tmp_path):
    with Launcher(tmp_path, 2, RANK_PROGRAM, "0=plain", "1=plain") as launcher:
        launcher.until_all_run().process.terminate()
        assert launcher.result() == (143, "", "")


def test_a_second_signal_kills_all_ranks(tmp_path):
    with Launcher(tmp_path, 2, RANK_PROGRAM, "0=deaf") as launcher:
        process = launcher.until_all_run().process
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):  # rank 0 ignores the signal
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert launcher.result()[0] == 130


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    with Launcher(tmp_path, 3, RANK_PROGRAM) as launcher:
        launcher.until_all_run().process.kill()
        deadline = time.monotonic() + 10
        while alive(launcher.pids()):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_program_that_cannot_be_started_leaves_no_rank(monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1]
    )
    sleeper = RankCommand("studio", (sys.executable, "-c", "import time; time.sleep(300)"))
    with pytest.raises(DPOError, match=r"rank 1 \(mini\): `/no/program` cannot be started"):
        launch([sleeper, RankCommand("mini", ("/no/program",))], pytest.fail)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_ring_has_an_address_per_rank_and_shares_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with ring_on_this_machine(3) as variables:
        hostfile = Path(variables[0]["MLX_HOSTFILE"])
        assert hostfile.read_text().count("127.0.0.1:") == 3
        assert [each["MLX_RANK"] for each in variables] == ["0", "1", "2"]
        assert {each["OPENBLAS_NUM_THREADS"] for each in variables} == {"2"}
    assert not hostfile.exists()
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    with ring_on_this_machine(2) as variables:
        assert variables[1]["OPENBLAS_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (None, "ended"),
        (2, "ended (exit code 2)"),
        (-9, "was killed by SIGKILL"),
        (-199, "was killed by signal 199"),
    ],
)
def test_an_end_is_described(status, text):
    assert describe_end(status) == text
