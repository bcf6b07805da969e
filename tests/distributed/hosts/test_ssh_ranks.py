"""Ranks on other hosts: what reaches them, and that none of their processes is left."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mlx_dpo.distributed.hosts.check import check_hosts
from mlx_dpo.distributed.hosts.hostfile import Host, Hostfile
from mlx_dpo.distributed.hosts.remote import run_rank
from mlx_dpo.distributed.hosts.ssh import PROGRAMS, Place, rank_commands, ssh_argv
from mlx_dpo.distributed.launch import launch
from tests.distributed.hosts import fake_ssh
from tests.distributed.hosts.ssh_server import find_server, ssh_server

HERE = Host("localhost", ("127.0.0.1",), (None, "rdma_en5"))
OTHER = Host("127.0.0.2", ("127.0.0.2",), ("rdma_en5", None))
END_SECONDS = 60  # in which a process has to end


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_ssh.install(tmp_path / "bin"))
    return tmp_path


def make_file(backend="ring", **variables):
    return Hostfile(Path("hosts.json"), (HERE, OTHER), backend, variables)


def request(code, folder, **variables):
    return {
        "folder": str(folder),
        "argv": [sys.executable, "-c", code],
        "environment": variables,
        "files": {"MLX_HOSTFILE": '[["127.0.0.1:1"]]'},
    }


@contextmanager
def remote(code, folder, **variables):
    """Run Python code as a rank of another host; yield the process of ssh."""
    argv = ssh_argv("127.0.0.2", sys.executable, run_rank, request(code, folder, **variables))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()


def wait_until_gone(pid):
    limit = time.monotonic() + END_SECONDS
    while time.monotonic() < limit:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} was left")


SHOW = """
import json, os
path = os.environ["MLX_HOSTFILE"]
print(json.dumps([os.getcwd(), os.environ["A"], open(path).read(), path, os.environ["SSH_HOST"]]))
"""
VALUE = 'it\'s "$HOME" `x` \\ !! ü\n'


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh", "fish", "tcsh"])
def test_folder_variables_and_files_reach_the_host_by_each_login_shell(ssh, monkeypatch, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    monkeypatch.setenv("FAKE_SSH_SHELL", shutil.which(shell))
    folder = ssh / "a folder"
    folder.mkdir()
    with remote(SHOW, folder, A=VALUE) as process:
        shown, _ = process.communicate(timeout=END_SECONDS)
    where, value, hosts, path, name = json.loads(shown)
    assert (where, value, hosts, name) == (str(folder), VALUE, '[["127.0.0.1:1"]]', "127.0.0.2")
    assert not os.path.exists(path)  # the file is removed at the end


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137), ("", 0)],
)
def test_the_exit_code_comes_back(ssh, code, expected):
    with remote(code, ssh) as process:
        assert process.wait(END_SECONDS) == expected


def test_a_program_that_is_missing_is_named(ssh):
    wrong = request("", ssh) | {"argv": ["/no/python"]}
    done = subprocess.run(
        ssh_argv("mac2", sys.executable, run_rank, wrong), capture_output=True, text=True, stdin=-3
    )
    assert done.returncode == 127
    assert "/no/python: cannot be started (No such file or directory)" in done.stderr


# A rank that shows its own process, one that it started, and each line that it reads.
CHATTY = """
import os, signal, subprocess, sys
{before}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
for line in sys.stdin:
    print("read", line, end="", flush=True)
{after}
"""


def test_lines_of_the_launcher_reach_the_rank(ssh):
    with remote(CHATTY.format(before="", after=""), ssh) as process:
        pids = process.stdout.readline().split()
        process.stdin.write("stop 2\n")
        process.stdin.flush()
        assert process.stdout.readline() == "read stop 2\n"
        process.stdin.close()
        assert process.wait(END_SECONDS) == 0
    for pid in pids:
        wait_until_gone(int(pid))


@pytest.mark.parametrize("how", ["stdin is closed", "ssh is killed"])
def test_no_process_stays_after_the_launcher_is_gone(ssh, monkeypatch, how):
    sent = PROGRAMS[run_rank].replace(b"GRACE_SECONDS = 5.0", b"GRACE_SECONDS = 0.5")
    assert sent != PROGRAMS[run_rank]
    monkeypatch.setitem(PROGRAMS, run_rank, sent)
    # The rank ignores all signals but SIGKILL, and the end of its standard input.
    before = "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]"
    after = "import time; time.sleep(600)"
    with remote(CHATTY.format(before=before, after=after), ssh) as process:
        pids = process.stdout.readline().split()
        if how == "stdin is closed":
            process.stdin.close()
        else:
            process.send_signal(signal.SIGHUP)  # as sshd does at the end of a connection
        for pid in pids:
            wait_until_gone(int(pid))
        assert process.wait(END_SECONDS) == 137


def test_ranks_of_jaccl_get_its_variables(tmp_path):
    file = make_file("jaccl-ring", A="b", OPENBLAS_NUM_THREADS="3")
    place = Place("~/venv/bin/python", "~/work")
    ports = [[32323], []]
    local, other = rank_commands(file, place, ("python", "-c", "x"), ports, "1", tmp_path)
    assert local.environment == {
        "A": "b",
        "OPENBLAS_NUM_THREADS": "3",
        "MLX_RANK": "0",
        "MLX_JACCL_COORDINATOR": "127.0.0.1:32323",
        "MLX_JACCL_RING": "1",
        "MLX_IBV_DEVICES": str(tmp_path / "MLX_IBV_DEVICES"),
    }
    devices = (tmp_path / "MLX_IBV_DEVICES").read_text()
    assert json.loads(devices) == [[None, "rdma_en5"], ["rdma_en5", None]]
    sent = json.loads(base64.b64decode(other.argv[-1].split()[-1]))
    assert sent["argv"] == ["~/venv/bin/python", "-c", "x"]
    assert sent["folder"] == "~/work"
    assert sent["files"] == {"MLX_IBV_DEVICES": devices}
    fixed = {"MLX_RANK": "1", "MLX_DPO_LAUNCHED": "1", "MLX_JACCL_COORDINATOR": "127.0.0.1:32323"}
    assert fixed.items() <= sent["environment"].items()


CONNECT = """
from mlx_dpo.distributed.ranks import Ranks
ranks = Ranks.from_environment()
rows = ranks.all_gather_json("rank", [ranks.rank, ranks.size, ranks.backend])
print(rows)
raise SystemExit(0 if rows == [[0, 2, "ring"], [1, 2, "ring"]] else 1)
"""


def connect_over_ssh(folder, others=(OTHER,)):
    """Start ranks that connect to each other and exchange a value; return the exit code."""
    file = Hostfile(Path("hosts.json"), (HERE, *others), "ring", {})
    place = Place(sys.executable, os.getcwd())
    checked = check_hosts(file, place, [], None)
    assert checked.problems == []
    argv = (sys.executable, "-c", CONNECT)
    messages = []
    code = launch(rank_commands(file, place, argv, checked.ports, "1", folder), messages.append)
    assert messages == []
    return code


def test_a_rank_here_and_one_on_another_host_connect(ssh):
    assert connect_over_ssh(ssh) == 0


@pytest.mark.slow
def test_ranks_connect_over_a_real_ssh_server(tmp_path, monkeypatch):
    if find_server() is None:
        pytest.skip("OpenSSH's server is not installed (Debian: openssh-server)")
    with ssh_server(tmp_path) as programs:
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        (tmp_path / "files").mkdir()
        assert connect_over_ssh(tmp_path / "files") == 0


@pytest.mark.slow
def test_no_process_stays_after_a_real_connection_is_lost(tmp_path, monkeypatch):
    if find_server() is None:
        pytest.skip("OpenSSH's server is not installed (Debian: openssh-server)")
    before = "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]"
    code = CHATTY.format(before=before, after="import time; time.sleep(600)")
    with ssh_server(tmp_path) as programs:
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        with remote(code, tmp_path) as process:
            pids = process.stdout.readline().split()
            process.kill()
            for pid in pids:
                wait_until_gone(int(pid))
