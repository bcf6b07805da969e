"""The prefix trie of texts, against sets of prefixes that are counted one by one."""

import numpy as np
import pytest

from mlx_dpo.data.batches.prefix_trie import (
    PrefixTrie,
    common_prefix_length,
    count_distinct_prefixes,
    pair_texts,
)
from mlx_dpo.types import TokenizedPair


def random_texts(seed):
    """Texts of few different tokens, so that many begin alike, are equal, or begin another."""
    rng = np.random.default_rng(seed)
    vocab, longest = rng.integers(1, 5), rng.integers(2, 12)
    lengths = rng.integers(1, longest, rng.integers(1, 20))
    return [tuple(rng.integers(0, vocab, length).tolist()) for length in lengths]


def prefixes(text):
    return [text[: length + 1] for length in range(len(text))]


@pytest.mark.parametrize("seed", range(60))
def test_each_distinct_prefix_is_one_node_of_the_walk(seed):
    texts = random_texts(seed)
    distinct = {prefix for text in texts for prefix in prefixes(text)}
    trie = PrefixTrie(texts)
    assert len(trie) == len(distinct) == count_distinct_prefixes(texts)
    nodes = {}
    for text, path in zip(texts, trie.paths, strict=True):
        assert trie.ids[path].tolist() == list(text)
        assert trie.positions[path].tolist() == list(range(len(text)))
        for prefix, node in zip(prefixes(text), path.tolist(), strict=True):
            assert nodes.setdefault(prefix, node) == node
    assert sorted(nodes.values()) == list(range(len(distinct)))
    for prefix, node in nodes.items():  # the nodes below are those of longer prefixes
        below = [other for longer, other in nodes.items() if longer[: len(prefix)] == prefix]
        assert sorted(below) == list(range(node, trie.ends[node]))


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_texts_changes_only_the_order_of_paths(seed):
    texts = random_texts(seed)
    order = np.random.default_rng(seed).permutation(len(texts))
    trie, permuted = PrefixTrie(texts), PrefixTrie([texts[i] for i in order])
    for name in ("ids", "positions", "ends"):
        assert getattr(trie, name).tolist() == getattr(permuted, name).tolist()
    for place, index in enumerate(order):
        assert permuted.paths[place].tolist() == trie.paths[index].tolist()
    assert permuted.branches == trie.branches


def test_branches_say_what_the_next_text_leaves():
    trie = PrefixTrie([(1, 2, 3), (1, 2), (1, 5), (1, 5, 6), (4,)])
    assert [tuple(branch) for branch in trie.branches] == [(0, 0), (2, 0), (3, 2), (4, 0), (5, 3)]


def test_texts_are_prompts_with_completions_but_their_last_tokens():
    pairs = [TokenizedPair((1, 2), (3, 4), (5,)), TokenizedPair((6,), (7,), (8, 9))]
    assert pair_texts(pairs) == [(1, 2, 3), (6,), (1, 2), (6, 8)]


@pytest.mark.parametrize("shared", [0, 1, 2, 3, 7, 64, 65])
def test_common_prefixes_end_at_the_first_difference(shared):
    text = tuple(range(70))
    other = (*text[:shared], 99, *text[shared + 1 :])
    assert common_prefix_length(text, other) == common_prefix_length(other, text) == shared
    assert common_prefix_length(text, text[:shared]) == shared
