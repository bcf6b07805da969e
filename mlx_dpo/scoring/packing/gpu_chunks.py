"""Chunks of queries of a prefix trie for a GPU, which has to start kernels for each chunk.

A chunk of several texts computes scores that its mask hides; a chunk of its own costs the time of
`size`^2 / 2 scores, which is the balance that `queries_per_chunk` assumes. Neighboring texts are
therefore put into one chunk while that costs less.
"""

import itertools
from collections.abc import Sequence

import numpy as np

Bounds = tuple[int, int]  # first query of a chunk and the one after its last


def plan_gpu_chunks(
    positions: np.ndarray, starts: Sequence[int], size: int, window: int | None
) -> list[Bounds]:
    """Return the bounds of chunks of up to `size` queries, which cover all queries in order.

    Args:
        positions: position of each token in its texts, which is how many tokens it follows. (T,)
        starts: indices of tokens that do not follow the token before them; the first one is 0.
        size: maximum number of queries in a chunk.
        window: size of the sliding window in positions; None means no window.
    """

    def scores(bounds: Bounds) -> float:
        """Return the scores that a chunk computes per head."""
        start, end = bounds
        before = positions[start] if window is None else min(positions[start], window - 1)
        return float((end - start) * (end - start + before))

    chunks: list[Bounds] = []
    for piece in _pieces([*starts, len(positions)], size):
        if chunks and piece[1] - chunks[-1][0] <= size:
            joined = chunks[-1][0], piece[1]
            if scores(joined) <= scores(chunks[-1]) + scores(piece) + size**2 / 2:
                chunks[-1] = joined
                continue
        chunks.append(piece)
    return chunks


def _pieces(edges: Sequence[int], size: int) -> list[Bounds]:
    """Divide the tokens between each two `edges` into pieces of equal length, at most `size`."""
    pieces: list[Bounds] = []
    for first, last in itertools.pairwise(edges):
        count = -(-(last - first) // size)
        cuts = [first + (last - first) * i // count for i in range(count + 1)] if count else []
        pieces += itertools.pairwise(cuts)
    return pieces
