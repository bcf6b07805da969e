"""Hosts are checked before a run starts; what is missing is named with the command that helps."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dpo.distributed.hosts import check
from mlx_dpo.distributed.hosts.check import check_hosts, sleep_warnings
from mlx_dpo.distributed.hosts.hostfile import Host, Hostfile
from mlx_dpo.distributed.hosts.remote import facts
from mlx_dpo.distributed.hosts.ssh import Place, is_this_machine
from mlx_dpo.errors import ConfigError
from tests.distributed.hosts import fake_ssh

HERE = Host("localhost", ("127.0.0.1",), ())
OTHER = Host("127.0.0.2", ("127.0.0.2",), ())


def make_file(*hosts, backend="ring"):
    return Hostfile(Path("hosts.json"), hosts or (HERE, OTHER), backend, {})


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Put the fake `ssh` on PATH; the current folder holds a model and pairs."""
    monkeypatch.setenv("PATH", fake_ssh.install(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here" / "my model").mkdir(parents=True)
    (tmp_path / "here" / "my model" / "config.json").write_text("{}")
    (tmp_path / "here" / "pairs.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


INPUTS = ["my model", "pairs.jsonl"]


def test_a_host_with_everything_has_no_problem(ssh):
    checked = check_hosts(make_file(), Place(sys.executable, str(ssh / "here")), INPUTS, None)
    assert checked.problems == []
    assert set(checked.facts) == {"localhost", "127.0.0.2"}
    ports = [port for own in checked.ports for port in own]
    assert len(ports) == 2 and all(port > 1023 for port in ports)


def commands_of(line):
    return re.search(r"run `(.*?)`", line)[1]


@pytest.mark.parametrize("folder", ["{}/there", "~/in my home"])
def test_the_command_of_a_problem_removes_it(ssh, folder):
    place = Place(sys.executable, folder.format(ssh))
    [line] = check_hosts(make_file(), place, INPUTS, None).problems
    assert line.startswith(f"127.0.0.2: the folder {place.folder} is missing, my model is missing")
    assert "\n" not in line
    subprocess.run(commands_of(line), shell=True, check=True)
    assert check_hosts(make_file(), place, INPUTS, None).problems == []
    # Another content, under the same name and of the same size.
    there = Path(place.folder.replace("~", str(ssh / "home"), 1))
    (there / "my model" / "config.json").write_text("[]")
    [line] = check_hosts(make_file(), place, INPUTS, None).problems
    assert line.startswith("127.0.0.2: my model differs; run `ssh 127.0.0.2 ")
    subprocess.run(commands_of(line), shell=True, check=True)
    assert check_hosts(make_file(), place, INPUTS, None).problems == []


def test_each_host_with_a_problem_has_a_line(ssh):
    file = make_file(HERE, OTHER, Host("127.0.0.3", ("127.0.0.3",), ()))
    place = Place(sys.executable, str(ssh / "nothing"))
    lines = check_hosts(file, place, INPUTS, None).problems
    assert [line.partition(":")[0] for line in lines] == ["127.0.0.2", "127.0.0.3"]


def write_python(path, *, site=None, says=None):
    """Write a program that takes the place of Python; return its path."""
    path.write_text(
        f"#!/bin/sh\n{f'echo {says} >&2; exit 1' if says else ''}\n"
        f'PYTHONPATH={site} exec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_other_versions_are_named_with_the_command_that_installs_these(ssh):
    site = ssh / "site"
    (site / "mlx-9.9.dist-info").mkdir(parents=True)
    (site / "mlx-9.9.dist-info" / "METADATA").write_text("Name: mlx\nVersion: 9.9\n")
    python = write_python(ssh / "python", site=site)
    [line] = check_hosts(make_file(), Place(python, str(ssh / "here")), INPUTS, None).problems
    own = facts.find_version("mlx")
    assert line == (
        f"127.0.0.2: mlx is 9.9 (here {own}); "
        f"run `ssh 127.0.0.2 '{python} -m pip install mlx=={own}'`"
    )


def test_a_missing_python_is_named_with_the_command_that_installs_it(ssh):
    place = Place("~/no venv/bin/python", str(ssh / "here"))
    [line] = check_hosts(make_file(), place, INPUTS, None).problems
    assert line.startswith("127.0.0.2: there is no Python at ~/no venv/bin/python; run `ssh 127")
    command = commands_of(line)
    assert "python3 -m venv ~/'\"'\"'no venv'" in command
    assert f"mlx-dpo=={facts.find_version('mlx-dpo')}" in command
    assert line.endswith("or name another one with --host-python")


def test_a_python_that_fails_is_quoted(ssh):
    python = write_python(ssh / "python", says="cannot start")
    [line] = check_hosts(make_file(), Place(python, str(ssh / "here")), INPUTS, None).problems
    assert line == (
        "127.0.0.2: its Python failed (cannot start); name another one with --host-python"
    )


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("anna@127.0.0.2: Permission denied (publickey).", "`ssh-copy-id 127.0.0.2`"),
        ("Host key verification failed.", "accept its key once: `ssh 127.0.0.2`"),
        ("ssh: Could not resolve hostname mac2", "fix `ssh` in the hostfile"),
        ("ssh: connect to host mac2 port 22: Connection refused", "Remote Login"),
    ],
)
def test_a_host_that_ssh_cannot_reach_is_named_with_the_remedy(ssh, monkeypatch, message, advice):
    monkeypatch.setenv("FAKE_SSH_SAYS", message)
    checked = check_hosts(make_file(), Place(sys.executable, str(ssh)), INPUTS, None)
    [line] = checked.problems
    assert line.startswith(f"127.0.0.2: ssh cannot reach it ({message}); ")
    assert advice in line
    assert set(checked.facts) == {"localhost"}


def test_no_ssh_program_is_one_line(ssh, monkeypatch):
    monkeypatch.setenv("PATH", str(ssh / "empty"))
    [line] = check_hosts(make_file(), Place(sys.executable, str(ssh)), INPUTS, None).problems
    assert line == "127.0.0.2: there is no program `ssh` on this machine; install OpenSSH"


def test_the_first_host_is_this_machine(ssh):
    file = make_file(OTHER, HERE)
    with pytest.raises(ConfigError, match=r"hosts\.json: the first host, 127\.0\.0\.2, is not"):
        check_hosts(file, Place(sys.executable, str(ssh)), INPUTS, None)


@pytest.mark.parametrize(
    ("name", "address", "expected"),
    [
        ("localhost", "127.0.0.1", True),
        (socket.gethostname().upper(), "192.0.2.1", True),
        (f"{socket.gethostname().partition('.')[0]}.local", "192.0.2.1", True),
        (f"nobody-else@{socket.gethostname()}", "192.0.2.1", False),
        ("another-name", "192.0.2.1", False),  # an address for documentation: nobody has it
        ("another-name", "127.0.0.1", False),  # everybody has it
    ],
)
def test_this_machine_is_known_by_its_name_or_address(name, address, expected):
    assert is_this_machine(Host(name, (address,), ())) is expected


def test_consecutive_ports_are_given_as_mlx_launch_gives_them(ssh):
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = server.getsockname()[1]
    file = make_file(Host("localhost", ("127.0.0.1", "127.0.0.3"), ()), OTHER)
    place = Place(sys.executable, str(ssh / "here"))
    assert check_hosts(file, place, INPUTS, first).ports == [[first, first + 1], [first + 2]]


def test_a_port_in_use_and_a_foreign_address_are_named(ssh):
    place = Place(sys.executable, str(ssh / "here"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        lines = check_hosts(make_file(), place, INPUTS, port).problems
    assert lines[0].startswith(f"localhost: port {port} of 127.0.0.1 cannot be used (EADDRINUSE); ")
    foreign = Host("127.0.0.2", ("192.0.2.1",), ())
    [line] = check_hosts(make_file(HERE, foreign), place, INPUTS, None).problems
    assert line == ("127.0.0.2: 192.0.2.1 is not an address of this host; fix `ips` in hosts.json")


def test_jaccl_listens_at_the_first_host_alone(ssh):
    place = Place(sys.executable, str(ssh / "here"))
    checked = check_hosts(make_file(backend="jaccl"), place, INPUTS, None)
    assert [len(own) for own in checked.ports] == [1, 0]


def test_a_full_disk_is_named(ssh, monkeypatch):
    monkeypatch.setattr(check, "FREE_BYTES", 10**18)
    place = Place(sys.executable, str(ssh / "here"))
    line = check_hosts(make_file(), place, INPUTS, None).problems[1]
    assert re.match(r"127\.0\.0\.2: only .* are free in .*; free .* set TMPDIR in `envs`", line)


def test_threads_are_those_that_every_host_has_cores_for():
    file = make_file(HERE, HERE, OTHER)
    cores = {"localhost": {"cores": 10}, "127.0.0.2": {"cores": 8}}
    assert check.CheckedHosts(cores, [], []).threads(file) == 5


@pytest.mark.parametrize(
    ("shown", "minutes"),
    [
        (" displaysleep         10\n sleep                15 (sleep prevented by powerd)\n", 15),
        (" sleep                0\n", 0),
        ("Battery\n", None),
    ],
)
def test_sleep_settings_of_a_mac_are_read(tmp_path, monkeypatch, shown, minutes):
    program = tmp_path / "pmset"
    program.write_text(f"#!/bin/sh\nprintf '{shown}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert facts.read_sleep_minutes() == minutes
    warnings = sleep_warnings({"mac2": {"sleeps_after": minutes}})
    assert len(warnings) == (1 if minutes else 0)


def test_facts_are_read_below_the_lines_of_a_login_shell(ssh, monkeypatch):
    shell = ssh / "shell"
    shell.write_text('#!/bin/sh\necho "Welcome!"\nexec /bin/sh "$@"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("FAKE_SSH_SHELL", str(shell))
    place = Place(sys.executable, str(ssh / "here"))
    assert check_hosts(make_file(), place, INPUTS, None).problems == []


def test_facts_are_json():
    request = {"folder": ".", "paths": ["no such file"], "listen": []}
    found = facts.collect_facts(request)
    assert json.loads(json.dumps(found)) == found
    assert found["content"] == [None]
