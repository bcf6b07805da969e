"""`train --hosts` over a real ssh server: the weights of one process, and no process left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.hosts.ssh_server import find_server, ssh_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_server() is None,
        reason="OpenSSH's server is not installed (Debian: openssh-server)",
    ),
]

ROOT = Path(__file__).parents[3]
SECONDS = 300
CLI = "import sys; from mlx_dpo.cli import main; main()"
FLAGS = [
    "--model", "models/tiny-chat", "--micro-batch-size=2", "--batch-size=8", "--save-steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Run a server; return a hostfile and the variables with which its hosts are reached."""
    folder = tmp_path_factory.mktemp("hosts")
    rows = [{"ssh": f"127.0.0.{n}", "ips": [f"127.0.0.{n}"]} for n in (1, 2, 3)]
    (folder / "hosts.json").write_text(
        json.dumps({"hosts": rows, "envs": [f"PYTHONPATH={ROOT}", f"MARK={folder}"]})
    )
    with ssh_server(folder) as programs:
        yield (
            folder / "hosts.json",
            {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        )


def start(folder, *arguments, **variables):
    environment = os.environ | variables
    environment |= {
        "OPENBLAS_NUM_THREADS": "1", "MLX_DPO_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-c", CLI, "train", "examples/pairs.jsonl", *FLAGS]
    return subprocess.Popen(
        [*command, "--output", str(folder / "run"), *arguments],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    """Wait for the end of a process; return its exit code and its output."""
    try:
        shown, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, shown


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return the adapters of a single process after 8 steps."""
    folder = tmp_path_factory.mktemp("one")
    code, shown = finish(start(folder, "--max-steps=8"))
    assert code == 0, shown
    return (folder / "run" / "adapters.safetensors").read_bytes()


def ranks_of(hostfile):
    """Return the processes of this test's ranks by number, from their variables."""
    mark = f"MARK={hostfile.parent}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # ended
            continue
        rank = [v.partition(b"=")[2] for v in variables if v.startswith(b"MLX_RANK=")]
        if mark in variables and rank and os.getpgid(int(folder.name)) == int(folder.name):
            found[int(rank[0])] = int(folder.name)
    return found


def wait_until(condition, what):
    limit = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < limit, what
        time.sleep(0.05)
    return value


def wait_until_none_is_left(hostfile):
    wait_until(lambda: not ranks_of(hostfile), "a rank was left")


def wait_for_checkpoint(folder, process):
    def has_one():
        assert process.poll() is None, process.communicate()[0]
        return list((folder / "run" / "checkpoints").glob("step-*"))

    wait_until(has_one, "no checkpoint")


def test_two_hosts_train_the_weights_of_one_process(tmp_path, hosts, one_process):
    hostfile, variables = hosts
    process = start(tmp_path, "--max-steps=8", "--hosts", str(hostfile), **variables)
    code, shown = finish(process)
    assert code == 0, shown
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == one_process
    wait_until_none_is_left(hostfile)


def resume(folder, *arguments, **variables):
    code, shown = finish(start(folder, "--max-steps=8", "--resume", *arguments, **variables))
    assert code == 0, shown
    return (folder / "run" / "adapters.safetensors").read_bytes()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_ends_all_and_the_run_resumes_elsewhere(tmp_path, hosts, one_process, rank):
    hostfile, variables = hosts
    process = start(tmp_path, "--max-steps=8", "--hosts", str(hostfile), **variables)
    wait_for_checkpoint(tmp_path, process)
    os.kill(ranks_of(hostfile)[rank], signal.SIGKILL)
    code, shown = finish(process)
    assert code != 0
    assert re.search(rf"rank {rank} \(", shown), shown
    wait_until_none_is_left(hostfile)
    assert resume(tmp_path) == one_process


def test_ctrl_c_saves_one_step_of_all_hosts(tmp_path, hosts, one_process):
    hostfile, variables = hosts
    process = start(tmp_path, "--max-steps=8", "--hosts", str(hostfile), **variables)
    wait_for_checkpoint(tmp_path, process)
    os.kill(process.pid, signal.SIGINT)
    code, shown = finish(process)
    assert code == 130, shown
    wait_until_none_is_left(hostfile)
    assert resume(tmp_path, "--hosts", str(hostfile), **variables) == one_process


def test_no_rank_stays_after_the_launcher_is_killed(tmp_path, hosts):
    hostfile, variables = hosts
    process = start(tmp_path, "--max-steps=8", "--hosts", str(hostfile), **variables)
    wait_for_checkpoint(tmp_path, process)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    wait_until_none_is_left(hostfile)
