"""Folders outside of a run: the user's caches, and the model that ships with the package."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
CACHE_VARIABLE = "MLX_DPO_CACHE"


def cache_folder() -> Path:
    """Return the folder of all caches.

    The environment variable `MLX_DPO_CACHE` sets it; by default it is in the user's cache folder.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-dpo"


def cache_folder_or_none() -> Path | None:
    """Return the folder of all caches, or None if the user has no home folder."""
    try:
        return cache_folder()
    except RuntimeError:  # raised by `Path.home` and `Path.expanduser`
        return None


def reference_cache_folder() -> Path:
    """Return the folder of cached reference log-probabilities, which all runs share."""
    return cache_folder() / "reference"


def token_cache_folder() -> Path:
    """Return the folder of cached tokenized pairs, which all runs share."""
    return cache_folder() / "tokens"


def chat_history_file() -> Path:
    """Return the path of the file with the lines that the user typed in chats."""
    return cache_folder() / "chat-history"


def tiny_chat() -> Path:
    """Return the folder of the model that ships with the installed package or the checkout."""
    installed = PACKAGE / "shipped" / "tiny-chat"
    return installed if installed.is_dir() else PACKAGE.parent / "models" / "tiny-chat"
