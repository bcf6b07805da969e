"""Compute the log-probs of pairs under the reference once, and cache the log-probs on disk.

The reference does not change, so its log-probs do not change either. They are computed for all
pairs before the first update. Training then needs no second model in memory.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.training.logps_cache import SUFFIX, read_logps, write_logps
from mlx_dpo.types import PairLogps, TokenizedPair

BLOCK_SIZE = 256  # pairs per file; a crash loses at most one block


def reference_logps(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    provenance: str,
    cache: Path,
    score: DatasetScorer,
    labels: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda scored: None,
) -> PairLogps:
    """Return the log-probs of all pairs under the reference. (len(pairs),) each

    Log-probs found in the cache are not computed again.

    Args:
        model: the reference; used only for blocks of pairs that are not in the cache.
        provenance: text that identifies everything that determines the log-probs, except for the
            token ids.
        cache: folder of the cache. Its files are named by a digest of their inputs, so that runs
            share them.
        score: function that computes log-probs of a dataset without gradients.
        labels: labels of new files, shown by `mlx-dpo cache`.
        progress: called with the number of pairs whose log-probs were computed or read.
    """
    parts = []
    for start in range(0, len(pairs), BLOCK_SIZE):
        block = pairs[start : start + BLOCK_SIZE]
        path = cache / f"{_block_name(provenance, block)}{SUFFIX}"
        logps = read_logps(path, len(block))
        if logps is None:
            logps = score(model, block, progress=progress)
            write_logps(path, logps, labels)
        else:
            with suppress(PermissionError):  # a read-only cache works as well
                os.utime(path)
            progress(len(block))
        parts.append(logps)
    if not parts:
        return PairLogps(mx.zeros((0,)), mx.zeros((0,)))
    return PairLogps(
        chosen=mx.concatenate([part.chosen for part in parts]),
        rejected=mx.concatenate([part.rejected for part in parts]),
    )


def _block_name(provenance: str, block: Sequence[TokenizedPair]) -> str:
    return hashlib.sha256(f"{provenance}\n{pairs_digest(block)}".encode()).hexdigest()
