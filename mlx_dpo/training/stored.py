"""Log-probabilities of pairs as files: written whole, believed only if their checksum holds.

Knows no models, so that the cache can be looked through without loading one.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlx_dpo.arrays import read_arrays, write_arrays
from mlx_dpo.paths import partial_path
from mlx_dpo.types import PairLogps

SUFFIX = ".safetensors"
CHECKSUM = "sum"


def write_logps(path: Path, logps: PairLogps, labels: Mapping[str, str] | None = None) -> None:
    """Write beside, then rename: readers and later runs never see half a file.

    `labels` say for people where the numbers come from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path, os.getpid())
    try:
        write_arrays(partial, logps._asdict(), {**(labels or {}), CHECKSUM: _checksum(logps)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
