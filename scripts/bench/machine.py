"""Facts that belong to a measurement: machine, load, versions, commit; and memory of a process."""

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


def describe_machine() -> dict[str, str]:
    """Return date, commit, processor, cores and load: the first columns of every row."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "machine": processor(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def commit() -> str:
    """Return the short commit, with a `+` if the checkout differs from it; empty without git."""

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
    """Return the processor's marketing name, or its architecture."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions(*packages: str) -> str:
    """Return `name version` of the packages that are installed."""

    def describe(name: str) -> str | None:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return None

    return ", ".join(filter(None, map(describe, packages)))


def openblas() -> str | None:
    """Return the name by which OpenBLAS can be preloaded, or None if it is not installed."""
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL(OPENBLAS)
    except OSError:
        return None
    return OPENBLAS


def resident_bytes() -> int:
    """Return the resident memory of this process, or its peak if that is all the system reports."""
    status = _proc_status("VmRSS")
    return status if status is not None else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the peak memory of this process since its start or `reset_peak`."""
    status = _proc_status("VmHWM")
    if status is not None:
        return status
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Reset the peak to the current memory; return False if the system cannot."""
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
