"""Reference log-probabilities: computed once and cached on disk by content.

The reference is fixed, so its log-probabilities are as well. Scoring all pairs before the first
update keeps a second model out of memory and out of the training loop.
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
    """Return the reference log-probabilities of all pairs, from the cache if possible.

    (len(pairs),) each

    Args:
        model: The reference; used only for blocks that are not in the cache.
        provenance: Everything besides the token ids that determines the log-probabilities.
        cache: Folder of the cache; files are named by content, so that runs share them.
        score: Scorer without gradients.
        labels: Labels that `mlx-dpo cache` shows for new files.
        progress: Called with the number of newly scored pairs.
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
    """A reference that is updated every few steps: alpha policy + (1 - alpha) reference.

    It starts as the policy does. Until its first update the precomputed reference
    log-probabilities are valid. Adapter matrices are mixed one by one, as TRL mixes weights;
    with alpha = 1 the reference becomes the policy itself.

    Source: Gorbatovski et al. 2024, arXiv:2404.09656, Eq. 6 (soft) and Eq. 7 (hard, alpha = 1).
    """

    def __init__(
        self, policy: nn.Module, *, alpha: float, every: int, score: DatasetScorer
    ) -> None:
        """Copy the weights of the policy before the first step."""
        self.alpha, self.every, self._score = alpha, every, score
        self.weights: Arrays = named_arrays(policy.trainable_parameters())
        self.moved = False

    def restore(self, weights: Arrays) -> None:
        """Restore the weights of a checkpoint."""
        self.weights, self.moved = weights, True

    def follow(self, policy: nn.Module, step: int) -> None:
        """Update the reference if `step` is a multiple of `every`."""
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
        """Return log-probabilities under the reference, None before its first update. (B,) each"""
        if not self.moved:
            return None
        own = named_arrays(policy.trainable_parameters())
        policy.update(tree_unflatten(list(self.weights.items())))
        try:
            return self._score(policy, pairs)
        finally:
            policy.update(tree_unflatten(list(own.items())))
