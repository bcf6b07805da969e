"""Sets of pairs of random tokens that share beginnings as real data sets do."""

import random
from itertools import combinations

from mlx_dpo.profiling.bench.shapes import SEED
from mlx_dpo.types import TokenizedPair

Ids = tuple[int, ...]


class _Draw:
    """Random token ids and lengths."""

    def __init__(self, vocab_size: int) -> None:
        self.random, self.vocab_size = random.Random(SEED), vocab_size

    def length(self, least: int, most: int) -> int:
        return self.random.randint(least, most)

    def ids(self, least: int, most: int | None = None) -> Ids:
        """Return between `least` and `most` random token ids."""
        length = self.length(least, most or least)
        return tuple(self.random.choices(range(self.vocab_size), k=length))


def ranked_pairs(prompts: int, vocab_size: int) -> list[TokenizedPair]:
    """Return all 6 pairs of 4 completions of each prompt, with the lengths of UltraFeedback."""
    draw, pairs = _Draw(vocab_size), []
    for _ in range(prompts):
        prompt, completions = draw.ids(60, 240), [draw.ids(60, 300) for _ in range(4)]
        pairs += [TokenizedPair(prompt, a, b) for a, b in combinations(completions, 2)]
    return pairs


def system_pairs(pairs: int, vocab_size: int) -> list[TokenizedPair]:
    """Return pairs behind one system message of 600 tokens: prompts of 100, completions of 60."""
    draw = _Draw(vocab_size)
    system = draw.ids(600)
    return [TokenizedPair(system + draw.ids(100), draw.ids(60), draw.ids(60)) for _ in range(pairs)]


def dialogue_pairs(dialogues: int, vocab_size: int) -> list[TokenizedPair]:
    """Return a pair at each of 4 turns of each dialogue; the dialogue continues with `chosen`."""
    draw, pairs = _Draw(vocab_size), []
    for _ in range(dialogues):
        history: Ids = ()
        for _ in range(4):
            history += draw.ids(20, 60)
            chosen = draw.ids(40, 120)
            pairs.append(TokenizedPair(history, chosen, draw.ids(40, 120)))
            history += chosen
    return pairs


def branching_answers(pairs: int, vocab_size: int) -> list[TokenizedPair]:
    """Return pairs whose completions of 200 tokens branch at a uniformly distributed place."""
    draw, found = _Draw(vocab_size), []
    for _ in range(pairs):
        chosen = draw.ids(200)
        shared = draw.length(0, 199)
        found.append(TokenizedPair(draw.ids(60), chosen, chosen[:shared] + draw.ids(200 - shared)))
    return found
