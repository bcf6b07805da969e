"""An OpenSSH server of the tests, on a free port of loopback, with keys of its own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path

START_SECONDS = 30
ADDRESSES = (1, 2, 3)  # of loopback, at which the server listens


def find_server():
    """Return the path of `sshd`, or None where it is not installed or cannot be run."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
    programs = [shutil.which(name, path=path) for name in ("sshd", "ssh", "ssh-keygen")]
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        return None  # its folder for the separation of privileges
    return programs[0] if all(programs) else None


@contextmanager
def ssh_server(folder):
    """Run a server; yield a folder with a program `ssh` that reaches it as any 127.0.0.x."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for key in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True
        )
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    (folder / "sshd_config").write_text(
        "".join(f"ListenAddress 127.0.0.{n}:{port}\n" for n in ADDRESSES)
        + f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nPidFile none\n"
        "UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\nPort {port}\nUser {getuser()}\nIdentityFile {folder}/user\nIdentitiesOnly yes\n"
        f"UserKnownHostsFile {folder}/known\nStrictHostKeyChecking accept-new\n"
    )
    programs = folder / "bin"
    programs.mkdir()
    client = programs / "ssh"
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    client.chmod(0o755)
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(
            [find_server(), "-D", "-e", "-f", folder / "sshd_config"],
            stderr=log,
            start_new_session=True,
        )
    try:
        limit = time.monotonic() + START_SECONDS
        while "listening" not in (folder / "log").read_text():
            assert running.poll() is None and time.monotonic() < limit, (folder / "log").read_text()
            time.sleep(0.05)
        yield programs
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        running.wait()
