"""Log-probabilities of pairs as files: written whole, believed only if their checksum holds.

Knows no models, so that the cache can be looked through without loading one.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from mlx_dpo.io.arrays import read_arrays, write_arrays
from mlx_dpo.io.atomic import is_temporary, temporary_path
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


MODEL, COMPUTED_ON, WRITTEN = "model", "computed_on", "written"  # labels of a file
UNKNOWN = "unknown"  # of a file that was written before there were labels, or is damaged


@dataclass(frozen=True)
class Entry:
    """A file of the cache."""

    path: Path
    model: str
    computed_on: str  # device and number type
    pairs: int
    size: int  # bytes
    written: str | None
    last_used: datetime
    damaged: bool  # nobody will believe it: its pairs are scored again


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
    """What a new file says of itself. A folder is named without the way to it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {MODEL: model, COMPUTED_ON: computed_on, WRITTEN: now}


def entries(folder: Path) -> list[Entry]:
    """Every whole or damaged file of the cache, in the order of their names."""
    found = []
    for path in sorted(_files(folder)):
        with suppress(FileNotFoundError):  # somebody else clears
            found += [] if is_temporary(path) else [_entry(path)]
    return found


def groups(of: Iterable[Entry]) -> list[Group]:
    """The files that are not damaged, model by model."""
    found: dict[tuple[str, str], list[Entry]] = {}
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


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob(f"*{SUFFIX}") if path.is_file())


def _entry(path: Path) -> Entry:
    found, facts = read_labelled(path), path.stat()
    given = {} if found is None else found[1]
    return Entry(
        path=path,
        model=given.get(MODEL, UNKNOWN),
        computed_on=given.get(COMPUTED_ON, UNKNOWN),
        pairs=0 if found is None else len(found[0].chosen),
        size=facts.st_size,
        written=given.get(WRITTEN),
        last_used=datetime.fromtimestamp(facts.st_mtime, UTC),
        damaged=found is None,
    )
