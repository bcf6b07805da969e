"""Reference log-probabilities: scored once, kept on disk under a digest of what they are.

The reference never changes, so what it says of a pair never changes either. Scoring all
pairs before the first update keeps a second model out of memory and out of the loop.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.policy.scoring import Score
from mlx_dpo.preferences.columns import digest
from mlx_dpo.training.stored import SUFFIX, read_logps, write_logps
from mlx_dpo.types import PairLogps, TokenizedPair

BLOCK = 256  # pairs in a file: what a crash in the middle can cost


def reference_logps(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    provenance: str,
    cache: Path,
    score: Score,
    labels: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda scored: None,
) -> PairLogps:
    """What the reference says of every pair, from the cache where it has been asked before.
    (len(pairs),) each

    Args:
        model: The reference; it is run only for blocks that the cache lacks.
        provenance: Everything beside the token ids that determines the numbers.
        cache: Folder of the cache; files are named by content, so runs share them.
        score: How it is asked.
        labels: What `training.cache` is to show of new files.
        progress: Hears how many further pairs are done.
    """
    parts = []
    for start in range(0, len(pairs), BLOCK):
        block = pairs[start : start + BLOCK]
        path = cache / f"{_name(provenance, block)}{SUFFIX}"
        logps = read_logps(path, len(block))
        if logps is None:
            logps = score(model, block, progress=progress)
            write_logps(path, logps, labels)
        else:
            with suppress(PermissionError):  # a cache that can only be read serves as well
                os.utime(path)
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
