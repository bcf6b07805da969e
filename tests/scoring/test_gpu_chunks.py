"""Bounds of a prefix trie's chunks on a GPU: what is joined, what stays apart, and at what cost."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.scoring.packing import trie
from mlx_dpo.scoring.packing.gpu_chunks import plan_gpu_chunks
from mlx_dpo.scoring.packing.trie import TrieSequence
from mlx_dpo.types import TokenizedPair


def row(*texts):
    """Positions and starts of texts given as (tokens before, tokens)."""
    positions = np.concatenate([np.arange(before, before + count) for before, count in texts])
    starts = [0, *np.cumsum([count for _, count in texts])[:-1].tolist()]
    return positions, starts


def plan(*texts, size=512, window=None):
    positions, starts = row(*texts)
    return plan_gpu_chunks(positions, starts, size, window)


def test_short_texts_share_a_chunk_as_long_as_it_costs_less():
    """Two pairs of 143 + 45 tokens: 376^2 scores are less than 2 x 188^2 and a chunk; 564^2 not."""
    pair = (0, 143), (106, 45)
    assert plan(*pair) == [(0, 188)]
    assert plan(*pair, *pair) == [(0, 376)]
    assert plan(*pair, *pair, *pair, *pair) == [(0, 376), (376, 752)]
    assert plan(*pair, *pair, *pair, size=1024) == [(0, 564)]  # larger chunks cost more


def test_long_texts_are_divided_equally_and_stay_apart():
    assert plan((0, 639), (512, 127)) == [(0, 319), (319, 766)]
    assert plan((0, 400), (0, 400), size=512) == [(0, 400), (400, 800)]
    assert plan((0, 300), (0, 300), size=600) == [(0, 600)]
    assert plan((0, 300), (0, 300), size=400) == [(0, 300), (300, 600)]


def test_a_window_limits_the_keys_before_a_chunk():
    """Behind 2,000 tokens a text of its own reads all of them; in a window of 100 it does not."""
    texts = (2000, 40), (2000, 40), (0, 40)
    assert plan(*texts, size=256) == [(0, 80), (80, 120)]
    assert plan(*texts, size=256, window=100) == [(0, 120)]


@pytest.mark.parametrize("size", [1, 3, 64, 512])
def test_chunks_cover_all_queries_in_order(size):
    rng = np.random.default_rng(size)
    texts = [(int(rng.integers(0, 300)), int(rng.integers(1, 400))) for _ in range(40)]
    chunks = plan(*texts, size=size)
    assert [chunk[0] for chunk in chunks] == [0, *(chunk[1] for chunk in chunks[:-1])]
    assert chunks[-1][1] == sum(count for _, count in texts)
    assert all(0 < end - start <= size for start, end in chunks)


@pytest.mark.parametrize(
    "chosen, ranges, is_causal", [(50, ((0, 30), (79, 89)), True), (3, ((0, 42),), False)]
)
def test_a_long_sibling_is_cut_out_and_a_short_one_hidden(monkeypatch, chosen, ranges, is_causal):
    """What is cut out leaves a causal chunk, of which a GPU skips the hidden keys."""
    monkeypatch.setattr(trie, "is_cpu", lambda: False)
    pair = TokenizedPair(tuple(range(30)), (40, *range(chosen - 1)), (41, *range(10)))
    *before, rejected = TrieSequence([pair]).chunks(16, mx.float32, None)
    assert all(chunk.is_causal for chunk in before)
    assert (rejected.key_ranges, rejected.is_causal) == (ranges, is_causal)
