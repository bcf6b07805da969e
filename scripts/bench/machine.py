"""What a figure has to be read with: machine, load, versions, commit; and a process's memory."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPENBLAS = "libopenblas.so.0"


def facts() -> dict[str, str]:
    """Date, commit, processor, cores and load: the first columns of every row."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "machine": processor(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def commit() -> str:
    """The short commit, with a `+` if the checkout differs from it; empty outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "mlx_dpo", "scripts")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """The processor's marketing name, or its architecture."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions(*packages: str) -> str:
    """`name version` of the packages that are installed."""

    def found(name: str) -> str | None:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return None

    return ", ".join(filter(None, map(found, packages)))


def openblas() -> str | None:
    """The name by which OpenBLAS can be preloaded under MLX's CPU backend, if it is installed."""
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL(OPENBLAS)
    except OSError:
        return None
    return OPENBLAS


def resident_bytes() -> int:
    """Memory that this process holds now; its peak where the system tells no more."""
    status = _proc_status("VmRSS")
    return status if status is not None else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that this process held since it began, or since `forget_peak`."""
    status = _proc_status("VmHWM")
    if status is not None:
        return status
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> bool:
    """Begin the peak anew from what is held now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _proc_status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return int(values[name].split()[0]) * 1024 if name in values else None
