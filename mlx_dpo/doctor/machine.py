"""Collect facts about this machine for a bug report, without personal data."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx

from mlx_dpo import paths
from mlx_dpo.doctor.accelerators import find_neural_accelerators
from mlx_dpo.models.device import device_kind
from mlx_dpo.profiling.bench.device_speed import SQUARES, measure_product
from mlx_dpo.startup.openblas import use_openblas

PACKAGES = ("mlx-dpo", "mlx", "mlx-lm", "transformers", "huggingface-hub", "numpy")

Facts = dict[str, Any]


def versions() -> Facts:
    """Return the versions of packages (None if not installed), Python and operating system."""
    return {name: _version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        "system": _system(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _system() -> str:
    """Return name and version of the operating system, and the processor architecture.

    The kernel's version is left out because it may contain a person's name.
    """
    if platform.system() == "Darwin":
        name = f"macOS {platform.mac_ver()[0]}"
    else:
        try:
            name = platform.freedesktop_os_release()["PRETTY_NAME"]
        except (OSError, KeyError):
            name = platform.system()
    return f"{name} ({platform.machine()})"


def device() -> Facts:
    """Return facts about MLX's device, including the measured speed of float32 matrix products."""
    kind = device_kind()
    size = SQUARES[kind]
    return {
        "kind": kind,
        "name": mx.device_info(mx.default_device()).get("device_name"),
        "cores": os.cpu_count(),
        "openblas": use_openblas() if kind == "cpu" else None,
        "gflops": round(measure_product(size, size, size).flops / 1e9, 1),
        "neural_accelerators": find_neural_accelerators()._asdict(),
    }


def memory() -> Facts:
    """Return the memory of the machine and of the device, and MLX's limits, in bytes."""
    cache_limit = mx.set_cache_limit(0)  # the only way to read it
    mx.set_cache_limit(cache_limit)
    info = mx.device_info(mx.default_device())
    return {
        "physical": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "device": info.get("memory_size"),
        "recommended": info.get("max_recommended_working_set_size"),
        "memory_limit": mx.get_memory_limit(),
        "cache_limit": cache_limit,
    }


def folders() -> Facts:
    """Return the cache folders' paths, and the free bytes of each and of the current folder."""
    cache, models = paths.cache_folder(), Path(huggingface_hub.constants.HF_HUB_CACHE)
    return {
        "reference_cache": {"path": cache, "free": 0 if cache is None else _free_bytes(cache)},
        "hub_cache": {"path": models, "free": _free_bytes(models)},
        "current": {"free": _free_bytes(Path.cwd())},
    }


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def collect_facts() -> Facts:
    """Return all facts about this machine, grouped by subject.

    Only the folders' paths may contain the user's name; `anonymous` removes it.
    """
    return {
        "versions": versions(),
        "device": device(),
        "memory": memory(),
        "folders": folders(),
        "hub_token": huggingface_hub.get_token() is not None,
    }


def from_home(path: Path) -> Path:
    """Return the path in the form `~/...` if it is in the home folder, else unchanged."""
    try:
        home = Path.home()
    except RuntimeError:  # no home folder is known
        return path
    return Path("~") / path.relative_to(home) if path.is_relative_to(home) else path


def anonymous(path: Path) -> str:
    """Return the path in the form `~/...`, or only its last part if it is outside `~`."""
    shown = from_home(path)
    return shown.name if shown.is_absolute() else str(shown)
