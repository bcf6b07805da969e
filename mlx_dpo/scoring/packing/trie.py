"""Packed sequence of the prefix trie of all texts of a pass: each distinct prefix once.

A chunk of queries sees several ranges of keys: those of the prefixes that lead to it, without what
lies between them and belongs to other texts.

Shape letters: those of `packed_sequence`.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import mlx.core as mx
import numpy as np

from mlx_dpo.data.batches.prefix_trie import PrefixTrie, pair_texts
from mlx_dpo.models.device import is_cpu
from mlx_dpo.scoring.kernels.attention import QueryChunk
from mlx_dpo.scoring.packing.gpu_chunks import plan_gpu_chunks
from mlx_dpo.scoring.packing.packed_sequence import HeadRows, PackedSequence, additive_mask
from mlx_dpo.types import TokenizedPair, scored_completions

# Keys between two ranges of keys that the CPU computes and hides instead of cutting them out.
MAX_HIDDEN_KEYS = 32


class TrieSequence(PackedSequence):
    """A packed sequence that is the depth-first walk of the trie of all texts."""

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        """Pack the texts of `pairs` into one sequence."""
        self.pairs = pairs
        self.trie = PrefixTrie(pair_texts(pairs))
        super().__init__(self.trie.ids, self.trie.positions)
        # Padding is one chain at the end: the ends of the trie's nodes leave it out.
        self.ends = np.concatenate([self.trie.ends, np.full(self.padding, len(self))])  # (T,)

    def head_rows(self) -> HeadRows:
        """Return each token that predicts with each target once, and where it is used."""
        lengths = [len(p.chosen) for p in self.pairs] + [len(p.rejected) for p in self.pairs]
        places = [
            path[len(path) - length :]
            for path, length in zip(self.trie.paths, lengths, strict=True)
        ]
        for number, pair in enumerate(self.pairs):
            if pair.gaps:
                places[number] = places[number][pair.scored]
        targets = np.array(list(chain(*scored_completions(self.pairs))))
        keys = np.concatenate(places) << 32 | targets
        distinct, rows = np.unique(keys, return_inverse=True)
        return HeadRows(
            mx.array((distinct >> 32).astype(np.int32)),
            mx.array((distinct & 0xFFFFFFFF).astype(np.int32)),
            mx.array(rows.reshape(-1).astype(np.int32)),
        )

    def make_chunks(self, size: int, dtype: mx.Dtype, window: int | None) -> Iterator[QueryChunk]:
        """Yield chunks of up to `size` queries with their masks."""
        gap = MAX_HIDDEN_KEYS if is_cpu() else size // 4  # more ranges start more kernels
        for start, end in self._bounds(size, window):
            yield self._chunk(start, end, dtype, window, gap)

    def _bounds(self, size: int, window: int | None) -> Iterator[tuple[int, int]]:
        """Yield the bounds of the chunks.

        On the CPU, a chunk ends early where the next text leaves more than half a chunk of the text
        before: most queries behind that place do not see it.
        """
        texts_end = len(self) - self.padding
        if not is_cpu():
            starts = [b.start for b in self.trie.branches] + ([texts_end] if self.padding else [])
            yield from plan_gpu_chunks(self.positions, starts, size, window)
            return
        starts = [b.start for b in self.trie.branches if b.start == 0 or b.left > size // 2]
        for first, last in pairwise([*starts, texts_end, len(self)]):
            for start in range(first, last, size):
                yield start, min(start + size, last)

    def _chunk(
        self, start: int, end: int, dtype: mx.Dtype, window: int | None, gap: int
    ) -> QueryChunk:
        """Return the chunk of the queries from `start` to `end`.

        Args:
            gap: keys between two ranges of keys that are computed and hidden, not cut out.
        """
        # Nodes before the chunk that one of its queries sees are above its first query.
        keys = np.concatenate([np.flatnonzero(self.ends[:start] > start), np.arange(start, end)])
        rows = np.arange(start, end)[:, None]
        visible = (keys <= rows) & (rows < self.ends[keys])  # (C, keys)
        if window is not None:
            visible &= self.positions[rows] - self.positions[keys] < window
            needed = visible.any(axis=0)
            keys, visible = keys[needed], visible[:, needed]
        ranges = _key_ranges(keys, gap)
        if sum(last - first for first, last in ranges) > len(keys):
            whole = np.concatenate([np.arange(*part) for part in ranges])  # (S,)
            widened = np.zeros((end - start, len(whole)), bool)
            widened[:, np.searchsorted(whole, keys)] = visible
            visible = widened
        # Only a GPU gains: it skips what a causal chunk hides, and computes what a mask hides.
        is_causal = not is_cpu() and _is_causal(visible)
        return QueryChunk(start, end, ranges, additive_mask(visible, dtype), is_causal)


def _key_ranges(keys: np.ndarray, gap: int) -> tuple[tuple[int, int], ...]:
    """Return ranges that cover the ascending indices `keys` and lie more than `gap` apart."""
    cuts = np.flatnonzero(np.diff(keys) > gap + 1)
    firsts, lasts = keys[np.append(0, cuts + 1)], keys[np.append(cuts, -1)]
    return tuple((int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True))


def _is_causal(visible: np.ndarray) -> bool:
    """Return whether the last query sees all keys, and each query before it one key less."""
    rows, keys = visible.shape
    return bool((visible == np.tri(rows, keys, keys - rows, dtype=bool)).all())
