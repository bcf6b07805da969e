"""Compute the log-probs of pairs under the reference, once, and cache them on disk.

The reference does not change, so its log-probs do not change either. They are computed for all
pairs before the first update, which keeps a second model out of memory and out of the training
loop.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.io.arrays import Arrays, named_arrays
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
        provenance: text that identifies everything besides the token ids that determines the
            log-probs.
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


class SyncedReference:
    """A reference that moves towards the policy every few steps (TRL's `sync_ref_model`).

    Its weights become alpha * policy + (1 - alpha) * reference. It starts with the weights of the
    policy, so the precomputed reference log-probs are valid until its first update. Adapter
    matrices are mixed one by one, as TRL mixes weights; with alpha = 1 the reference becomes the
    policy itself.

    Source: Gorbatovski et al. 2024, arXiv:2404.09656, Eq. 6 (soft) and Eq. 7 (hard, alpha = 1).
    """

    def __init__(
        self, policy: nn.Module, *, alpha: float, every: int, score: DatasetScorer
    ) -> None:
        """Start with the trainable weights that the policy has before the first step."""
        self.alpha, self.every, self._score = alpha, every, score
        self.weights: Arrays = named_arrays(policy.trainable_parameters())
        self.moved = False

    def restore(self, weights: Arrays) -> None:
        """Restore the reference's weights from a checkpoint."""
        self.weights, self.moved = weights, True

    def follow(self, policy: nn.Module, step: int) -> None:
        """Move the reference towards the policy if `step` is a multiple of `every`."""
        if step % self.every:
            return
        own = named_arrays(policy.trainable_parameters())
        self.weights = {
            name: self.alpha * own[name] + (1 - self.alpha) * value
            for name, value in self.weights.items()
        }
        mx.eval(self.weights)
        self.moved = True

    def logps(self, policy: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps | None:
        """Return the log-probs of `pairs` under this reference. (B,) each

        The result is None before the first update, when the precomputed log-probs are still valid.
        """
        if not self.moved:
            return None
        own = named_arrays(policy.trainable_parameters())
        policy.update(tree_unflatten(list(self.weights.items())))
        try:
            return self._score(policy, pairs)
        finally:
            policy.update(tree_unflatten(list(own.items())))
