"""Folders outside a run: the user's cache and the model that ships with the package."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent


def cache_folder() -> Path:
    """Where reference log-probabilities are kept between runs; `MLX_DPO_CACHE` moves it."""
    if folder := os.environ.get("MLX_DPO_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-dpo"


def tiny_chat() -> Path:
    """The model that ships: inside the installed package, or `models/` of a checkout."""
    installed = PACKAGE / "shipped" / "tiny-chat"
    return installed if installed.is_dir() else PACKAGE.parent / "models" / "tiny-chat"
