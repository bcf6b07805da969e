"""Reference log-probabilities: scored once, kept on disk under a digest of what they are.

The reference never changes, so what it says of a pair never changes either. Scoring all
pairs before the first update keeps a second model out of memory and out of the loop.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.arrays import read_arrays, write_arrays
from mlx_dpo.policy.scorers import Scorer, plain_scorer
from mlx_dpo.policy.scoring import score_pairs
from mlx_dpo.preferences.pairs import digest
from mlx_dpo.types import PairLogps, TokenizedPair

BLOCK = 256  # pairs in a file: what a crash in the middle can cost


def reference_logps(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    provenance: str,
    cache: Path,
    pairs_per_pass: int,
    scorer: Scorer = plain_scorer,
    progress: Callable[[int], None] = lambda scored: None,
) -> PairLogps:
    """What the reference says of every pair, from the cache where it has been asked before.
    (len(pairs),) each

    Args:
        model: The reference; it is run only for blocks that the cache lacks.
        provenance: Everything beside the token ids that determines the numbers.
        cache: Folder of the cache; files are named by content, so runs share them.
        scorer: How it is asked; without gradients.
        progress: Hears how many further pairs are done.
    """
    parts = []
    for start in range(0, len(pairs), BLOCK):
        block = pairs[start : start + BLOCK]
        path = cache / f"{_name(provenance, block)}.safetensors"
        logps = read_logps(path, len(block))
        if logps is None:
            logps = score_pairs(
                model, block, pairs_per_pass=pairs_per_pass, scorer=scorer, progress=progress
            )
            write_logps(path, logps)
        else:
            progress(len(block))
        parts.append(logps)
    if not parts:
        return PairLogps(mx.zeros((0,)), mx.zeros((0,)))
    return PairLogps(
        chosen=mx.concatenate([part.chosen for part in parts]),
        rejected=mx.concatenate([part.rejected for part in parts]),
    )


def _name(provenance: str, block: Sequence[TokenizedPair]) -> str:
    return hashlib.sha256(f"{provenance}\n{digest(block)}".encode()).hexdigest()


def write_logps(path: Path, logps: PairLogps) -> None:
    """Write beside, then rename: readers and later runs never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}-{os.getpid()}.safetensors")
    try:
        write_arrays(partial, logps._asdict(), {"sum": _checksum(logps)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_logps(path: Path, count: int) -> PairLogps | None:
    """What `write_logps` wrote, or None if there is nothing or it is damaged. (count,) each"""
    if not path.is_file():
        return None
    try:
        arrays, metadata = read_arrays(path)
        logps = PairLogps(**arrays)
    except (RuntimeError, TypeError):
        return None
    whole = logps.chosen.shape == logps.rejected.shape == (count,)
    return logps if whole and metadata.get("sum") == _checksum(logps) else None


def _checksum(logps: PairLogps) -> str:
    content = np.array(logps.chosen).tobytes() + np.array(logps.rejected).tobytes()
    return hashlib.sha256(content).hexdigest()
