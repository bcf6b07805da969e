"""Log-probabilities of pairs as files: written whole, believed only if their checksum holds.

Knows no models, so that the cache can be looked through without loading one.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dpo.io.arrays import read_arrays, write_arrays
from mlx_dpo.io.atomic import temporary_path
from mlx_dpo.io.cache_listing import UNKNOWN, CacheEntry, list_cache
from mlx_dpo.types import PairLogps

SUFFIX = ".safetensors"
CHECKSUM = "sum"


def write_logps(path: Path, logps: PairLogps, labels: Mapping[str, str] | None = None) -> None:
    """Write beside, then rename: readers and later runs never see half a file.

    `labels` say for people where the numbers come from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(path) as temporary:
        write_arrays(temporary, logps._asdict(), {**(labels or {}), CHECKSUM: _checksum(logps)})
        os.replace(temporary, path)


def read_logps(path: Path, count: int) -> PairLogps | None:
    """What `write_logps` wrote, or None if there is nothing or it is damaged. (count,) each"""
    found = read_labelled(path)
    return found[0] if found is not None and len(found[0].chosen) == count else None


def read_labelled(path: Path) -> tuple[PairLogps, dict[str, str]] | None:
    """What `write_logps` wrote, with its labels, or None if there is nothing or it is damaged."""
    if not path.is_file():
        return None
    try:
        arrays, labels = read_arrays(path)
        logps = PairLogps(**arrays)
    except (RuntimeError, TypeError):
        return None
    whole = logps.chosen.shape == logps.rejected.shape and logps.chosen.ndim == 1
    return (logps, labels) if whole and labels.pop(CHECKSUM, "") == _checksum(logps) else None


def _checksum(logps: PairLogps) -> str:
    content = np.array(logps.chosen).tobytes() + np.array(logps.rejected).tobytes()
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, kw_only=True)
class LogpsCacheEntry(CacheEntry):
    """A file of cached reference log-probabilities."""

    computed_on: str = UNKNOWN  # device and dtype


@dataclass(frozen=True)
class Group:
    """The files of one model, as it was computed with."""

    model: str
    computed_on: str
    files: int
    pairs: int
    size: int
    first_written: str | None
    last_used: datetime


def labels(model: str, computed_on: str) -> dict[str, str]:
    """Return the labels of a new file: model, device and dtype, and the time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"model": model, "computed_on": computed_on, "written": now}


def list_entries(folder: Path) -> list[LogpsCacheEntry]:
    """Return the files of the cache, sorted by name."""
    return list_cache(folder, SUFFIX, LogpsCacheEntry, _read_labels)


def groups(of: Iterable[LogpsCacheEntry]) -> list[Group]:
    """The files that are not damaged, model by model."""
    found: dict[tuple[str, str], list[LogpsCacheEntry]] = {}
    for entry in of:
        if not entry.damaged:
            found.setdefault((entry.model, entry.computed_on), []).append(entry)
    return [
        Group(
            *key,
            files=len(members),
            pairs=sum(entry.pairs for entry in members),
            size=sum(entry.size for entry in members),
            first_written=min((e.written for e in members if e.written), default=None),
            last_used=max(entry.last_used for entry in members),
        )
        for key, members in sorted(found.items())
    ]


def _read_labels(path: Path) -> dict[str, Any] | None:
    content = read_labelled(path)
    return None if content is None else {**content[1], "pairs": len(content[0].chosen)}
