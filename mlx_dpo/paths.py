"""Folders outside a run: the user's caches, how they are written, and the model that ships."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
MOVES_CACHE = "MLX_DPO_CACHE"


def cache_folder() -> Path:
    """Where things are kept between runs; `MLX_DPO_CACHE` moves it."""
    if folder := os.environ.get(MOVES_CACHE):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-dpo"


def reference_cache() -> Path:
    """The folder of reference log-probabilities, which runs share."""
    return cache_folder() / "reference"


def token_cache() -> Path:
    """The folder of tokenized pairs, which runs share."""
    return cache_folder() / "tokens"


def chat_history() -> Path:
    """What was typed in earlier chats."""
    return cache_folder() / "chat-history"


def tiny_chat() -> Path:
    """The model that ships: inside the installed package, or `models/` of a checkout."""
    installed = PACKAGE / "shipped" / "tiny-chat"
    return installed if installed.is_dir() else PACKAGE.parent / "models" / "tiny-chat"
