"""Folders outside of a run: the caches of the user and the model that ships with the package."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
MOVES_CACHE = "MLX_DPO_CACHE"


def cache_folder() -> Path:
    """Return the cache folder, which the environment variable `MLX_DPO_CACHE` can set."""
    if folder := os.environ.get(MOVES_CACHE):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-dpo"


def reference_cache() -> Path:
    """Return the folder of cached reference log-probabilities, which runs share."""
    return cache_folder() / "reference"


def token_cache() -> Path:
    """Return the folder of cached tokenized pairs, which runs share."""
    return cache_folder() / "tokens"


def chat_history() -> Path:
    """Return the path of the input history of chats."""
    return cache_folder() / "chat-history"


def tiny_chat() -> Path:
    """Return the folder of the model that ships: in the installed package, or in a checkout."""
    installed = PACKAGE / "shipped" / "tiny-chat"
    return installed if installed.is_dir() else PACKAGE.parent / "models" / "tiny-chat"
