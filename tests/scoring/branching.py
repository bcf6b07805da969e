"""Sets of pairs whose texts share beginnings, and their packed sequences one token at a time."""

import numpy as np

from mlx_dpo.types import TokenizedPair


def branching_sets(vocab_size, *, scale=1):
    """Return sets of pairs that share in different ways, by name.

    Args:
        scale: factor of the numbers of tokens.
    """
    rng = np.random.default_rng(5)

    def ids(length):
        return tuple(rng.integers(0, vocab_size, length).tolist())

    prompt, system = ids(9 * scale), ids(20 * scale)
    ranked = [ids(7 * scale), ids(3 * scale), ids(11 * scale), ids(1)]
    alike = []
    for _ in range(2):
        text, chosen = ids(4 * scale), ids(6 * scale)
        at = 2 * scale
        other = (*chosen[:at], (chosen[at] + 1) % vocab_size, *chosen[at + 1 :])
        alike.append(TokenizedPair(text, chosen, other))
    short, long = ids(2), ids(2) + ids(3)
    turns = [ids(5 * scale) for _ in range(3)]
    return {
        "unrelated": [TokenizedPair(ids(a), ids(b), ids(c)) for a, b, c in ((5, 1, 4), (9, 6, 2))],
        "four completions, six pairs": [
            TokenizedPair(prompt, ranked[a], ranked[b]) for a in range(4) for b in range(a + 1, 4)
        ],
        "system prompt": [
            TokenizedPair(system + ids(2 * scale), ids(3 * scale), ids(2)) for _ in range(3)
        ],
        "completions that begin alike": [
            *alike,
            TokenizedPair(prompt, short, short + long),
            TokenizedPair(prompt, short, short),
            TokenizedPair(prompt + short, ids(1), ids(1)),
        ],
        "a pair at each turn": [
            TokenizedPair(sum(turns[:turn], ()), turns[turn], ids(4 * scale)) for turn in (1, 2)
        ],
    }


def texts(pairs):
    """Return the texts of which `pairs` need every prefix: chosen, then rejected."""
    return [p.prompt + p.chosen[:-1] for p in pairs] + [p.prompt + p.rejected[:-1] for p in pairs]
