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
from mlx.utils import tree_unflatten

from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.training.logps_cache import SUFFIX, read_logps, write_logps
from mlx_dpo.types import PairLogps, TokenizedPair

BLOCK_SIZE = 256  # pairs in a file: what a crash in the middle can cost


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
    for start in range(0, len(pairs), BLOCK_SIZE):
        block = pairs[start : start + BLOCK_SIZE]
        path = cache / f"{_block_name(provenance, block)}{SUFFIX}"
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


def _block_name(provenance: str, block: Sequence[TokenizedPair]) -> str:
    return hashlib.sha256(f"{provenance}\n{pairs_digest(block)}".encode()).hexdigest()


class SyncedReference:
    """Every so many steps, reference <- alpha policy + (1 - alpha) reference.

    It starts where the policy does. Until it moves, nothing is asked of it: what the
    reference said before the first step still holds. The factors of adapters are mixed one
    by one, as TRL mixes weights; for alpha = 1 it is the policy itself.

    Source: Gorbatovski et al. 2024, arXiv:2404.09656, Eq. 6 (soft) and Eq. 7 (hard, alpha = 1).
    """

    def __init__(
        self, policy: nn.Module, *, alpha: float, every: int, score: DatasetScorer
    ) -> None:
        """Start from the policy as it is before the first step."""
        self.alpha, self.every, self._score = alpha, every, score
        self.weights: Arrays = named_arrays(policy.trainable_parameters())
        self.moved = False

    def restore(self, weights: Arrays) -> None:
        """Go on from the weights of a checkpoint at which it had moved."""
        self.weights, self.moved = weights, True

    def follow(self, policy: nn.Module, step: int) -> None:
        """Take a stride towards the policy, if `step` updates are a multiple of `every`."""
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
        """What it says of the pairs, None while it is where it started. (len(pairs),) each"""
        if not self.moved:
            return None
        own = named_arrays(policy.trainable_parameters())
        policy.update(tree_unflatten(list(self.weights.items())))
        try:
            return self._score(policy, pairs)
        finally:
            policy.update(tree_unflatten(list(own.items())))
