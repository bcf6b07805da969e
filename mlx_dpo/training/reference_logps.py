"""Compute the log-probs of pairs under the reference once, and cache the log-probs on disk.

The reference does not change, so its log-probs do not change either. They are computed before the
first update, for the pairs that the steps will see. Training then needs no second model in memory.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.data.dataset import select_pairs
from mlx_dpo.distributed.ranks import SINGLE_PROCESS, Ranks
from mlx_dpo.errors import reason
from mlx_dpo.io.notices import notify_once
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.training.logps_cache import SUFFIX, read_logps, write_logps
from mlx_dpo.types import PairLogps, TokenizedPair

BLOCK_SIZE = 256  # pairs per file; a crash loses at most one block


@dataclass(frozen=True, kw_only=True)
class ReferenceCache:
    """A folder of reference log-probs, in files named by a digest of what determines them.

    A file has the log-probs of all pairs of its block, so no file is partial.

    Attributes:
        folder: folder of the files, which runs share; None if there is no cache.
        provenance: text that identifies everything that determines the log-probs, except for the
            token ids.
        labels: labels of new files, shown by `mlx-dpo cache`.
        ranks: ranks of the run. Rank 0 reads and writes its cache and sends what it finds, so that
            all ranks score the same blocks.
    """

    folder: Path | None
    provenance: str
    labels: Mapping[str, str] | None = None
    ranks: Ranks = SINGLE_PROCESS

    def read(self, block: Sequence[TokenizedPair]) -> PairLogps | None:
        """Return the log-probs of a block of pairs; None if they are not in the cache."""
        return broadcast_logps(self.ranks, self._read(block) if self.ranks.is_main else None)

    def _read(self, block: Sequence[TokenizedPair]) -> PairLogps | None:
        if (path := self._path(block)) is None:
            return None
        logps = read_logps(path, len(block))
        if logps is not None:
            with suppress(OSError):  # a read-only cache works as well
                os.utime(path)
        return logps

    def write(self, block: Sequence[TokenizedPair], logps: PairLogps) -> None:
        """Write the log-probs of a block of pairs to a file.

        If the cache cannot be written, a notice is logged once.
        """
        if not self.ranks.is_main or (path := self._path(block)) is None:
            return
        try:
            write_logps(path, logps, self.labels)
        except OSError as error:  # full, read-only, or a file is in its place
            notify_once(f"{path.parent}: reference log-probs are not cached ({reason(error)})")

    def _path(self, block: Sequence[TokenizedPair]) -> Path | None:
        if self.folder is None:
            return None
        inputs = f"{self.provenance}\n{pairs_digest(block)}"
        return self.folder / f"{hashlib.sha256(inputs.encode()).hexdigest()}{SUFFIX}"


def broadcast_logps(ranks: Ranks, logps: PairLogps | None) -> PairLogps | None:
    """Return the log-probs that rank 0 has, or None; those of other ranks are not used."""
    if ranks.is_alone:
        return logps
    arrays = {} if logps is None else {k: np.array(v) for k, v in logps._asdict().items()}
    [sent, *_] = ranks.all_gather_arrays("known log-probs", arrays if ranks.is_main else {})
    return PairLogps(mx.array(sent["chosen"]), mx.array(sent["rejected"])) if sent else None


def reference_logps(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    indices: Sequence[int] | None = None,
    *,
    cache: ReferenceCache,
    score: DatasetScorer,
    progress: Callable[[int], None] = lambda scored: None,
) -> PairLogps:
    """Return the log-probs of the pairs at `indices` under the reference. (len(pairs),) each

    The log-probs of the other pairs are NaN: a step that used one by mistake would fail. Log-probs
    in the cache are not computed again.

    Args:
        model: the reference; used only for blocks of pairs that are not in the cache.
        pairs: all pairs of a split.
        indices: indices of the pairs that the run needs; None needs all.
        cache: log-probs that earlier runs have computed.
        score: function that computes log-probs of a dataset without gradients.
        progress: called with the number of pairs whose log-probs were computed or read.
    """
    logps = np.full((2, len(pairs)), np.nan, np.float32)
    needed = range(len(pairs)) if indices is None else frozenset(indices)
    for block in _blocks(pairs, indices, cache):
        of_block = select_pairs(pairs, block)
        found = cache.read(of_block)
        if found is None:
            found = score(model, of_block, progress=progress)
            cache.write(of_block, found)
        else:
            progress(sum(index in needed for index in block))
        logps[:, block] = np.array(found.chosen), np.array(found.rejected)
    return PairLogps(mx.array(logps[0]), mx.array(logps[1]))


def _blocks(
    pairs: Sequence[TokenizedPair], indices: Sequence[int] | None, cache: ReferenceCache
) -> list[Sequence[int]]:
    """Return the blocks of pairs to read or to score, as indices.

    A run that needs all pairs has the blocks of the data set. A run that needs some pairs reads
    these blocks if the cache has them; otherwise its blocks have only the pairs that it needs, in
    the order of its steps, so that a longer run finds them again. Blocks are never completed later:
    log-probs differ in their last bits with the pairs that share a forward pass, and a run must not
    depend on what other runs have scored.
    """
    blocks = _cut(range(len(pairs)))
    if indices is None or len(indices) == len(pairs):
        return blocks
    seen = [blocks[number] for number in sorted({index // BLOCK_SIZE for index in indices})]
    if all(cache.read(select_pairs(pairs, block)) is not None for block in seen):
        return seen
    return _cut(indices)


def _cut(indices: Sequence[int]) -> list[Sequence[int]]:
    return [indices[start : start + BLOCK_SIZE] for start in range(0, len(indices), BLOCK_SIZE)]


def are_scored(logps: PairLogps, indices: Sequence[int] | None = None) -> bool:
    """Return whether the pairs at `indices`, or all pairs, have reference log-probs."""
    values = np.array(logps.chosen) + np.array(logps.rejected)
    return bool(np.isfinite(values if indices is None else values[list(indices)]).all())
