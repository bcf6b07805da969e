"""Collect facts about a machine that is to run a rank, as JSON on standard output.

This program is sent as text to machines on which mlx-dpo may be absent.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

PACKAGES = ("mlx-dpo", "mlx", "mlx-lm")
HASHED_BYTES = 64_000_000  # of a file whose content is compared; of a larger one, its size is
BLOCK_BYTES = 1 << 20
# Files by which a folder with a model is compared.
COMPARED = (".json", ".safetensors", ".jinja", ".model", ".txt", ".jsonl", ".parquet", ".csv")


def collect_facts(request: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that `request` asks for.

    Args:
        request: `folder`, the working folder; `paths`, files and folders that the run reads;
            `listen`, pairs of an address and a port, 0 for any free one.
    """
    folder = os.path.expanduser(request["folder"])
    temporary = tempfile.gettempdir()
    program = os.path.join(os.path.dirname(sys.executable), "mlx-dpo")
    return {
        "name": platform.node(),
        "system": platform.system(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "executable": sys.executable,
        "has_pip": find_spec("pip") is not None,
        "program": program if os.access(program, os.X_OK) else None,
        "versions": {name: find_version(name) for name in PACKAGES},
        "has_folder": os.path.isdir(folder),
        "content": [describe(os.path.join(folder, path)) for path in request["paths"]],
        "temporary": temporary,
        "free": shutil.disk_usage(temporary).free,
        "ports": find_ports(request["listen"]),
        "sleeps_after": read_sleep_minutes(),
    }


def find_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(path: str) -> str | None:
    """Return a digest of a file, or of the files of a folder; None if there is none."""
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return digest_file(path)
    if not os.path.isdir(path):
        return None
    digest = hashlib.sha256()
    for parent, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(COMPARED) and not name.startswith("."):
                file = os.path.join(parent, name)
                digest.update(f"{os.path.relpath(file, path)} {digest_file(file)}\n".encode())
    return digest.hexdigest()


def digest_file(path: str) -> str:
    """Return a digest of a file's content; of a large file, of its size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        if size <= HASHED_BYTES:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def find_ports(addresses: list[tuple[str, int]]) -> list[tuple[int, str]]:
    """Listen at each address and port for a moment; return the ports and names of errors.

    Where that failed, the port is 0 and the name that of `errno`; otherwise the name is empty.
    """
    sockets: list[socket.socket] = []
    results: list[tuple[int, str]] = []
    for address, port in addresses:
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sockets.append(server)  # open until all have a port, so that no port is given twice
        # As MLX's ring: a connection that was closed a moment ago does not count.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address, port))
            server.listen(1)
            results.append((server.getsockname()[1], ""))
        except OSError as error:
            results.append((0, errno.errorcode.get(error.errno or 0, str(error))))
    for server in sockets:
        server.close()
    return results


def read_sleep_minutes() -> int | None:
    """Return after how many idle minutes a Mac sleeps, 0 for never; None if that is unknown."""
    program = shutil.which("pmset", path=os.environ.get("PATH", "") + ":/usr/bin")
    if program is None:
        return None
    shown = subprocess.run([program, "-g"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"^\s*sleep\s+(\d+)", shown, re.MULTILINE)
    return int(found[1]) if found else None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(collect_facts(json.loads(base64.b64decode(sys.argv[-1])))))
