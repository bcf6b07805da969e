"""Prefix trie of the texts of a pass: every prefix that several texts share is stored once.

Two texts that begin with the same tokens have the same hidden states there, because a causal model
sees only what comes before a token. So a pass needs each distinct prefix of its texts only once,
whether the texts share a prompt, a system message, or the beginning of a completion.

Shape letters: T distinct prefixes, which are the nodes of the trie.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlx_dpo.types import TokenizedPair

Ids = tuple[int, ...]


def pair_texts(pairs: Sequence[TokenizedPair]) -> list[Ids]:
    """Return prompt + completion of all chosen, then of all rejected completions.

    The last token of each completion is left out, because no token follows it.
    """
    return [pair.prompt + pair.chosen[:-1] for pair in pairs] + [
        pair.prompt + pair.rejected[:-1] for pair in pairs
    ]


def count_distinct_prefixes(texts: Sequence[Ids]) -> int:
    """Return the number of different non-empty prefixes of the texts."""
    return sum(
        len(text) - common_prefix_length(before, text)
        for before, text in pairwise([(), *sorted(texts)])
    )


def common_prefix_length(first: Ids, second: Ids) -> int:
    """Return the number of tokens with which both texts begin."""
    known, limit = 0, min(len(first), len(second))
    while known < limit:  # tuples are compared in C: bisection is faster than a loop over tokens
        middle = (known + limit + 1) // 2
        if first[known:middle] == second[known:middle]:
            known = middle
        else:
            limit = middle - 1
    return known


class Branch(NamedTuple):
    """A place where the depth-first walk leaves a text and continues with the next one."""

    start: int  # index of the first node of the next text
    left: int  # nodes of the text before that the next text does not share


class PrefixTrie:
    """The trie of some texts as arrays, in the order of a depth-first walk.

    The nodes below a node follow it directly. A token therefore sees exactly the nodes before it
    whose `ends` lie behind it, and itself.

    Attributes:
        ids: token id of each node. (T,)
        positions: position of each node's token in its texts, which is its depth. (T,)
        ends: index after the last node below each node. (T,)
        paths: for each text, in the order given, the indices of its tokens' nodes.
        branches: where the walk continues with another text, in order; the first starts at 0.
    """

    def __init__(self, texts: Sequence[Ids]) -> None:
        """Build the trie. The order of `texts` changes nothing but the order of `paths`."""
        ids, positions = [], []
        self.branches: list[Branch] = []
        self.paths: list[np.ndarray] = [np.zeros(0, np.int64)] * len(texts)
        left: list[tuple[np.ndarray, int]] = []  # nodes whose last descendant is known
        before: Ids = ()
        size, path = 0, np.zeros(0, np.int64)
        # In lexicographic order, each text shares its longest known prefix with the one before.
        for number in sorted(range(len(texts)), key=texts.__getitem__):
            text = texts[number]
            shared = common_prefix_length(before, text)
            new = len(text) - shared
            if new:
                self.branches.append(Branch(size, len(path) - shared))
                left.append((path[shared:], size))
                path = np.concatenate([path[:shared], np.arange(size, size + new)])
                ids.append(np.array(text[shared:], np.int32))
                positions.append(np.arange(shared, len(text)))
                size, before = size + new, text
            self.paths[number] = path
        self.ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self.positions = np.concatenate(positions) if ids else np.zeros(0, np.int64)
        self.ends = np.full(size, size)
        for nodes, end in left:
            self.ends[nodes] = end

    def __len__(self) -> int:
        """Return the number of nodes: the number of distinct prefixes."""
        return len(self.ids)
