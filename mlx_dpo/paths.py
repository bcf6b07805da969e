"""Folders outside of a run: the user's caches, and model and pairs that ship with the package."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
CACHE_VARIABLE = "MLX_DPO_CACHE"


def cache_folder() -> Path | None:
    """Return the folder of all caches; None if it is not known where the user's home is.

    The environment variable `MLX_DPO_CACHE` sets it; by default it is in the user's cache folder.
    """
    folder = os.environ.get(CACHE_VARIABLE) or os.environ.get("XDG_CACHE_HOME")
    if not folder and os.environ.get("HOME") == "":  # Python would take the root folder
        return None
    try:
        path = Path(folder or "~/.cache").expanduser()
    except RuntimeError:  # no HOME, or a user without a home
        return None
    return path if os.environ.get(CACHE_VARIABLE) else path / "mlx-dpo"


def reference_cache_folder() -> Path | None:
    """Return the folder of cached reference log-probabilities, which all runs share."""
    return _inside_cache("reference")


def token_cache_folder() -> Path | None:
    """Return the folder of cached tokenized pairs, which all runs share."""
    return _inside_cache("tokens")


def reply_cache_folder() -> Path | None:
    """Return the folder of replies of models at addresses, which all commands share."""
    return _inside_cache("replies")


def chat_history_file() -> Path | None:
    """Return the path of the file with the lines that the user typed in chats."""
    return _inside_cache("chat-history")


def _inside_cache(name: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / name


def tiny_chat() -> Path:
    """Return the folder of the model that ships with the installed package or the checkout."""
    installed = PACKAGE / "shipped" / "tiny-chat"
    return installed if installed.is_dir() else PACKAGE.parent / "models" / "tiny-chat"


def example_pairs() -> Path:
    """Return the file of ten example pairs in the installed package or the checkout."""
    installed = PACKAGE / "shipped" / "examples" / "pairs.jsonl"
    return installed if installed.is_file() else PACKAGE.parent / "examples" / "pairs.jsonl"
