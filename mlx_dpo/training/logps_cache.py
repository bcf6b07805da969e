"""Read, write and list files of cached reference log-probs, which carry a checksum."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dpo.errors import DamagedFileError
from mlx_dpo.io.atomic import temporary_path
from mlx_dpo.io.cache_listing import UNKNOWN, CacheEntry, list_cache
from mlx_dpo.io.checksums import read_checked_arrays, verify_arrays, write_checked_arrays
from mlx_dpo.io.notices import notify_once
from mlx_dpo.types import PairLogps

SUFFIX = ".safetensors"
CHECKSUM = "sum"


def write_logps(path: Path, logps: PairLogps, labels: Mapping[str, str] | None = None) -> None:
    """Write log-probs to a file atomically, with the `labels` that `mlx-dpo cache` shows.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(path) as temporary:
        write_checked_arrays(temporary, logps._asdict(), dict(labels or {}))
        os.replace(temporary, path)


def read_logps(path: Path, count: int) -> PairLogps | None:
    """Return the log-probs of chosen and of rejected completions in a file. (count,) each

    The result is None if the file is missing or damaged, or does not hold `count` pairs. A notice
    tells of a damaged file.
    """
    content = read_labelled(path)
    if content is not None and len(content[0].chosen) == count:
        return content[0]
    if os.path.lexists(path):
        notify_once(f"{path}: damaged; its {count:,} pairs are scored again")
    return None


def read_labelled(path: Path) -> tuple[PairLogps, dict[str, str]] | None:
    """Return the log-probs and the labels in a file; None if the file is missing or damaged."""
    try:
        arrays, labels = read_checked_arrays(path)
        logps = PairLogps(**arrays)
    except (OSError, RuntimeError, TypeError, ValueError, DamagedFileError):
        return None
    are_pairs = logps.chosen.shape == logps.rejected.shape and logps.chosen.ndim == 1
    # Earlier versions stored a checksum of the log-probs alone.
    is_valid = are_pairs and (verify_arrays(path) or labels.pop(CHECKSUM, "") == _checksum(logps))
    return (logps, labels) if is_valid else None


def _checksum(logps: PairLogps) -> str:
    content = np.array(logps.chosen).tobytes() + np.array(logps.rejected).tobytes()
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, kw_only=True)
class LogpsCacheEntry(CacheEntry):
    """A file of cached reference log-probs, as listed by `mlx-dpo cache`."""

    computed_on: str = UNKNOWN  # device and dtype


@dataclass(frozen=True)
class ModelGroup:
    """Totals (files, pairs, bytes) over the cache files with the same model, device and dtype."""

    model: str
    computed_on: str
    files: int
    pairs: int
    size: int
    first_written: str | None
    last_used: datetime


def labels(model: str, computed_on: str) -> dict[str, str]:
    """Return the labels of a new cache file: its model, its device and dtype, the current time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"model": model, "computed_on": computed_on, "written": now}


def list_entries(folder: Path) -> list[LogpsCacheEntry]:
    """Return the files of the cache in `folder`, sorted by name."""
    return list_cache(folder, SUFFIX, LogpsCacheEntry, _read_labels)


def group_by_model(entries: Iterable[LogpsCacheEntry]) -> list[ModelGroup]:
    """Return the totals (files, pairs, bytes) for each model, device and dtype.

    Damaged files are left out.
    """
    groups: dict[tuple[str, str], list[LogpsCacheEntry]] = {}
    for entry in entries:
        if not entry.damaged:
            groups.setdefault((entry.model, entry.computed_on), []).append(entry)
    return [
        ModelGroup(
            *key,
            files=len(members),
            pairs=sum(entry.pairs for entry in members),
            size=sum(entry.size for entry in members),
            first_written=min((e.written for e in members if e.written), default=None),
            last_used=max(entry.last_used for entry in members),
        )
        for key, members in sorted(groups.items())
    ]


def _read_labels(path: Path) -> dict[str, Any] | None:
    content = read_labelled(path)
    return None if content is None else {**content[1], "pairs": len(content[0].chosen)}
