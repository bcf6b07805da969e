"""Sets of pairs with texts in common, and the tokens that a scorer computes of each."""

from collections.abc import Sequence
from itertools import combinations

from mlx_dpo.data.batches.token_counts import CountTokens
from mlx_dpo.profiling.bench.figures import Sharing
from mlx_dpo.profiling.bench.shapes import RandomTokens
from mlx_dpo.types import TokenizedPair

PROMPT, ANSWER, SYSTEM = 100, 60, 600  # tokens
ANSWERS = 4  # to the prompt of a ranked set
TURNS = 4  # of a dialogue
PAIRS = 4  # of the other sets


def count_sharing(vocab_size: int, cost: CountTokens) -> list[Sharing]:
    """Return the tokens of each example set, if all its pairs go through the model together.

    Args:
        cost: function that counts the tokens that a scorer puts through the layers.
    """
    sets = example_sets(RandomTokens(vocab_size))
    return [
        Sharing(name, len(pairs), whole_tokens(pairs), cost(pairs).total)
        for name, pairs in sets.items()
    ]


def example_sets(tokens: RandomTokens) -> dict[str, list[TokenizedPair]]:
    """Return sets of pairs by what their texts have in common; the ids are random."""
    prompts = [tokens(PROMPT) for _ in range(PAIRS)]
    system = tokens(SYSTEM)
    return {
        f"{PAIRS} pairs, prompts differ": [_pair(prompt, tokens) for prompt in prompts],
        f"{ANSWERS} ranked answers, all pairs": _ranked(prompts[0], tokens),
        f"{PAIRS} pairs, system prompt of {SYSTEM}": [
            _pair(system + prompt, tokens) for prompt in prompts
        ],
        f"dialogue, a pair at each of {TURNS} turns": _dialogue(tokens),
    }


def whole_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Return the tokens of the pairs as whole sequences, two per pair, without padding.

    The last token of a sequence predicts nothing and is not an input.
    """
    return sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs)


def _pair(prompt: tuple[int, ...], tokens: RandomTokens) -> TokenizedPair:
    return TokenizedPair(prompt, tokens(ANSWER), tokens(ANSWER))


def _ranked(prompt: tuple[int, ...], tokens: RandomTokens) -> list[TokenizedPair]:
    answers = [tokens(ANSWER) for _ in range(ANSWERS)]
    return [TokenizedPair(prompt, *pair) for pair in combinations(answers, 2)]


def _dialogue(tokens: RandomTokens) -> list[TokenizedPair]:
    pairs: list[TokenizedPair] = []
    history: tuple[int, ...] = ()
    for _ in range(TURNS):
        pair = _pair(history + tokens(PROMPT), tokens)
        pairs.append(pair)
        history = pair.prompt + pair.chosen
    return pairs
