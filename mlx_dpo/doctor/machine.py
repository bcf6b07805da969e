"""What a bug report needs to know of a machine, and nothing of its owner."""

import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx

from mlx_dpo import openblas as blas
from mlx_dpo import paths
from mlx_dpo.models.device import device_kind

PACKAGES = ("mlx-dpo", "mlx", "mlx-lm", "transformers", "huggingface-hub", "numpy")
SIDES = {"cpu": 512, "metal": 4096, "cuda": 8192}  # of the matrices that are timed
ENOUGH_SECONDS = 0.3

Facts = dict[str, Any]


def versions() -> Facts:
    """Versions by package name; None where one is not installed."""
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
    """The system's own name and version; a kernel's could carry the name of its builder."""
    if platform.system() == "Darwin":
        name = f"macOS {platform.mac_ver()[0]}"
    else:
        try:
            name = platform.freedesktop_os_release()["PRETTY_NAME"]
        except (OSError, KeyError):
            name = platform.system()
    return f"{name} ({platform.machine()})"


def device() -> Facts:
    """What MLX computes on, and how fast it multiplies float32 matrices."""
    kind = device_kind()
    return {
        "kind": kind,
        "name": mx.device_info(mx.default_device()).get("device_name"),
        "cores": os.cpu_count(),
        "openblas": blas.use_openblas() if kind == "cpu" else None,
        "gflops": round(_gflops(SIDES[kind]), 1),
    }


def _gflops(side: int) -> float:
    a, b = mx.random.normal((2, side, side))
    mx.eval(a @ b)
    done, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < ENOUGH_SECONDS or not done:
        mx.eval(a @ b)
        done += 1
    return 2 * side**3 * done / seconds / 1e9


def memory() -> Facts:
    """Bytes: of the machine, what the device recommends, and MLX's limits."""
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
    """Where things are kept, and the bytes free there and in the current folder."""
    cache, models = paths.cache_folder(), Path(huggingface_hub.constants.HF_HUB_CACHE)
    return {
        "reference_cache": {"path": cache, "free": _free(cache)},
        "hub_cache": {"path": models, "free": _free(models)},
        "current": {"free": _free(Path.cwd())},
    }


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def facts() -> Facts:
    """All of it, by subject. Holds no token, user name or host name."""
    return {
        "versions": versions(),
        "device": device(),
        "memory": memory(),
        "folders": folders(),
        "hub_token": huggingface_hub.get_token() is not None,
    }


def from_home(path: Path) -> Path:
    """The path with `~` for the home folder, if it lies there."""
    home = Path.home()
    return Path("~") / path.relative_to(home) if path.is_relative_to(home) else path


def anonymous(path: Path) -> str:
    """A path without its owner: from `~` on, or its last name alone."""
    shown = from_home(path)
    return shown.name if shown.is_absolute() else str(shown)
