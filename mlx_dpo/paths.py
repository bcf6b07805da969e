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


def partial_path(path: Path, process: int) -> Path:
    """Where a process writes what is to become `path`, a file of a cache."""
    return path.with_name(f".{path.stem}-{process}{path.suffix}")


def writer_of(partial: Path) -> int | None:
    """The process that writes, or wrote, this partial file; None for any other name."""
    process = partial.stem.rpartition("-")[2]
    return int(process) if partial.name.startswith(".") and process.isdecimal() else None


def abandoned(folder: Path, suffix: str) -> list[Path]:
    """What processes that are gone left half-written in a cache."""
    files = [path for path in sorted(folder.glob(f"*{suffix}")) if path.is_file()]
    partials = [(path, writer_of(path)) for path in files]
    return [path for path, process in partials if process is not None and not _alive(process)]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
