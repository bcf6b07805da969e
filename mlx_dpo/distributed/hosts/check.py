"""Check the machines of a hostfile before a run starts on them, with the command that helps."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mlx_dpo.distributed.hosts.hostfile import Host, Hostfile
from mlx_dpo.distributed.hosts.remote import facts
from mlx_dpo.distributed.hosts.ssh import Place, is_this_machine, quote_path, ssh_argv
from mlx_dpo.errors import ConfigError
from mlx_dpo.units import format_bytes

FACTS_SECONDS = 120  # for all facts of a host; a digest of a model takes seconds
FREE_BYTES = 1_000_000_000  # of the folder of temporary files, for a copy of the last checkpoint
NOT_FOUND = 127  # exit code of a shell for a program that is not there
SSH_FAILED = 255  # exit code of ssh for errors of its own
SSH_ADVICE = {  # by what ssh prints
    "Permission denied": "let this machine log in by its key: `ssh-copy-id {host}`",
    "Host key verification failed": "accept its key once: `ssh {host}`",
    "HOST IDENTIFICATION HAS CHANGED": "accept its key once: `ssh {host}`",
    "Could not resolve": "fix `ssh` in the hostfile",
}
SWITCH_ON = (
    "switch it on, and Remote Login in its settings (General > Sharing), then try `ssh {host}`"
)

Facts = dict[str, Any]


@dataclass(frozen=True)
class CheckedHosts:
    """The hosts of a hostfile, and what was found on them.

    Attributes:
        facts: by the name for ssh; see `remote/facts.py`. Hosts that cannot be reached are absent.
        ports: by rank, a free port for each address that is listened at.
        problems: one line for each host that cannot run its ranks.
    """

    facts: dict[str, Facts]
    ports: list[list[int]]
    problems: list[str]

    def threads(self, file: Hostfile) -> int:
        """Return the BLAS threads per rank that every host has cores for."""
        shares = [found["cores"] // file.ranks_on(name) for name, found in self.facts.items()]
        return max(1, min(shares, default=1))


def check_hosts(
    file: Hostfile, place: Place, paths: Sequence[str], first_port: int | None
) -> CheckedHosts:
    """Look at all hosts at the same time: programs, files, ports, disk and sleep.

    Args:
        file: the hosts.
        place: where mlx-dpo is on the other hosts.
        paths: local files and folders that the run reads, as the user wrote them.
        first_port: the first of consecutive ports, as of `mlx.launch`; None for free ones.

    Raises:
        ConfigError: the first host is not this machine.
    """
    if not is_this_machine(file.hosts[0]):
        raise ConfigError(
            f"{file.path}: the first host, {file.hosts[0].ssh}, is not this machine; rank 0 writes "
            "the run folder, so put this machine first, or start the command there"
        )
    listen = _listen(file, first_port)
    requests = {
        name: {"paths": list(paths), "listen": [pair for _, pair in pairs]}
        for name, pairs in listen.items()
    }
    hosts = {host.ssh: host for host in file.hosts}
    with ThreadPoolExecutor(len(hosts)) as pool:
        found = list(pool.map(lambda n: _collect(hosts[n], place, requests[n]), hosts))
    by_host = dict(zip(hosts, found, strict=True))
    own = by_host[file.hosts[0].ssh]
    assert isinstance(own, dict)
    ports: list[list[int]] = [[] for _ in file.hosts]
    problems = []
    for name, answer in by_host.items():
        if isinstance(answer, str):
            problems.append(answer)
            continue
        for (rank, _), (port, _) in zip(listen[name], answer["ports"], strict=True):
            ports[rank].append(port)
        pairs = [pair for _, pair in listen[name]]
        trouble = _HostProblems(hosts[name], place, own, answer)
        trouble.compare_versions()
        trouble.compare_files(paths)
        trouble.check_ports_and_disk(file, pairs)
        problems += trouble.as_line()
    reached = {name: answer for name, answer in by_host.items() if isinstance(answer, dict)}
    return CheckedHosts(reached, ports, problems)


def _listen(file: Hostfile, first: int | None) -> dict[str, list[tuple[int, tuple[str, int]]]]:
    """Return by host the ranks that listen, each with address and port (0 for any free one)."""
    listen: dict[str, list[tuple[int, tuple[str, int]]]] = {host.ssh: [] for host in file.hosts}
    count = 0
    for rank, host in enumerate(file.hosts):
        # Ring listens at each address; JACCL's coordinator is rank 0, at its first one.
        addresses = host.addresses if file.backend == "ring" else host.addresses[: rank == 0]
        for address in addresses:
            listen[host.ssh].append((rank, (address, 0 if first is None else first + count)))
            count += 1
    return listen


def _collect(host: Host, place: Place, request: dict[str, Any]) -> Facts | str:
    """Return the facts of a host, or the line that says why there are none."""
    if is_this_machine(host):
        return facts.collect_facts(request | {"folder": os.getcwd()})
    argv = ssh_argv(host.ssh, place.python, facts, request | {"folder": place.folder})
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=FACTS_SECONDS, check=False
        )
    except FileNotFoundError:
        return f"{host.ssh}: there is no program `ssh` on this machine; install OpenSSH"
    except subprocess.TimeoutExpired:
        return f"{host.ssh}: gave no answer in {FACTS_SECONDS} s; try `ssh {host.ssh}`"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode == 0:
        # A login shell may print lines of its own before.
        shown = done.stdout.decode(errors="replace").strip().splitlines()
        try:
            return dict(json.loads(shown[-1]))
        except (IndexError, ValueError):
            lines = shown
    last = lines[-1].strip() if lines else f"exit code {done.returncode}"
    if done.returncode == SSH_FAILED:
        advice = next((a for sign, a in SSH_ADVICE.items() if sign in "\n".join(lines)), SWITCH_ON)
        return f"{host.ssh}: ssh cannot reach it ({last}); {advice.format(host=host.ssh)}"
    if done.returncode == NOT_FOUND:
        return (
            f"{host.ssh}: there is no Python at {place.python}; run `"
            f"{_install(host.ssh, place.python)}`, or name another one with --host-python"
        )
    return f"{host.ssh}: its Python failed ({last}); name another one with --host-python"


def _install(host: str, python: str) -> str:
    """Return the command that makes a virtual environment with mlx-dpo on a host."""
    environment = quote_path(str(PurePosixPath(python).parent.parent))
    packages = [f"{name}=={facts.find_version(name)}" for name in facts.PACKAGES]
    command = f"{quote_path(python)} -m pip install {shlex.join(packages)}"
    return f"ssh {host} {shlex.quote(f'python3 -m venv {environment} && {command}')}"


class _HostProblems:
    """What is wrong with a host, and what to do."""

    def __init__(self, host: Host, place: Place, own: Facts, found: Facts) -> None:
        self.host, self.place, self.own, self.found = host, place, own, found
        self.is_here = is_this_machine(host)
        self.faults: list[str] = []
        self.commands: list[str] = []  # that the user can copy
        self.advice: list[str] = []

    def as_line(self) -> list[str]:
        """Return the line, or nothing if the host is as it has to be."""
        if not self.faults:
            return []
        run = [f"run `{' && '.join(self.commands)}`"] if self.commands else []
        return [f"{self.host.ssh}: {', '.join(self.faults)}; {'; '.join([*run, *self.advice])}"]

    def compare_versions(self) -> None:
        """Compare the versions of packages with those of this machine."""
        python, own_python = self.found["python"], self.own["python"]
        if python.split(".")[:2] != own_python.split(".")[:2]:
            self.faults.append(f"Python is {python} (here {own_python})")
            self.advice.append("name one of the same version with --host-python")
            return
        own, found = self.own["versions"], self.found["versions"]
        wrong = [name for name in own if own[name] != found[name]]
        if not wrong:
            return
        self.faults += [
            f"{name} {own[name]} is missing"
            if found[name] is None
            else f"{name} is {found[name]} (here {own[name]})"
            for name in wrong
        ]
        packages = shlex.join(f"{name}=={own[name]}" for name in wrong)
        python = quote_path(self.place.python)
        install = (
            f"{python} -m pip install {packages}"
            if self.found["has_pip"]
            else f"uv pip install --python {python} {packages}"
        )
        self.commands.append(f"ssh {self.host.ssh} {shlex.quote(install)}")

    def compare_files(self, paths: Sequence[str]) -> None:
        """Compare the model and the pairs with those of this machine."""
        if not self.found["has_folder"] and not self.is_here:
            self.faults.append(f"the folder {self.place.folder} is missing")
            folder = quote_path(self.place.folder)
            self.commands.append(f"ssh {self.host.ssh} {shlex.quote(f'mkdir -p {folder}')}")
            self.advice.append("or name another one with --host-folder")
        for path, own, found in zip(paths, self.own["content"], self.found["content"], strict=True):
            if own is not None and own != found:
                self.faults.append(f"{path} {'is missing' if found is None else 'differs'}")
                self.commands.append(copy_command(path, self.host.ssh, self.place.folder))

    def check_ports_and_disk(self, file: Hostfile, listen: Sequence[tuple[str, int]]) -> None:
        """Look at ports and disk."""
        for (address, port), (_, error) in zip(listen, self.found["ports"], strict=True):
            if error == "EADDRNOTAVAIL":
                self.faults.append(f"{address} is not an address of this host")
                self.advice.append(f"fix `ips` in {file.path}")
            elif error:
                self.faults.append(f"port {port or '(any)'} of {address} cannot be used ({error})")
                self.advice.append("end the program that uses it, or leave --starting-port out")
        if self.found["free"] < FREE_BYTES:
            folder = self.found["temporary"]
            self.faults.append(f"only {format_bytes(self.found['free'])} are free in {folder}")
            self.advice.append(
                f"free {format_bytes(FREE_BYTES)} there, or set TMPDIR in `envs` of {file.path}"
            )


def copy_command(path: str, host: str, folder: str) -> str:
    """Return the command that copies a local file or folder to the same place on a host.

    Args:
        path: the file or folder, as the user wrote it.
        host: name for ssh.
        folder: working folder there.
    """
    target = path if path.startswith("~/") else str(PurePosixPath(folder) / path)
    # A relative path begins in the home folder, for ssh and for rsync.
    target = target.removeprefix("~/")
    is_folder = os.path.isdir(os.path.expanduser(path))
    end = "/" if is_folder else ""
    parent = target if is_folder else str(PurePosixPath(target).parent)
    return (
        f"ssh {host} {shlex.quote(f'mkdir -p {shlex.quote(parent)}')} && "
        f"rsync -a {quote_path(path.rstrip('/'))}{end} {shlex.quote(f'{host}:{target}{end}')}"
    )


def default_place() -> Place:
    """Return the place of mlx-dpo on this machine, which is that on other hosts by default."""
    return Place(sys.executable, os.getcwd())


def sleep_warnings(checked: Mapping[str, Facts]) -> list[str]:
    """Return a line for each Mac that would fall asleep during a run without `caffeinate`."""
    return [
        f"{name} sleeps after {found['sleeps_after']} idle minutes, which ends the run; keep it "
        f"awake (`ssh {name} sudo pmset -a sleep 0`)"
        for name, found in checked.items()
        if found["sleeps_after"]
    ]
