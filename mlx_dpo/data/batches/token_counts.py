"""Number of tokens that a forward pass over some pairs processes, by the layout of the pass."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlx_dpo.data.batches.padding import (
    MIN_CONTINUATION,
    PAD_MULTIPLE,
    padded_width,
    round_up,
)
from mlx_dpo.data.batches.prefix_trie import (
    Ids,
    common_prefix_length,
    count_distinct_prefixes,
    pair_texts,
)
from mlx_dpo.types import TokenizedPair


class TokenCount(NamedTuple):
    """Number of tokens that the model processes in a forward pass, and the padding in it."""

    total: int  # including padding
    padding: int


# Counts the tokens of one forward pass over the pairs; the setting `scorer` decides which function.
CountTokens = Callable[[Sequence[TokenizedPair]], TokenCount]


def padded_row_tokens(pairs: Sequence[TokenizedPair]) -> TokenCount:
    """Count the input tokens of a forward pass with a padded sequence per completion.

    A sequence is a prompt and one completion, without the last token, which predicts nothing.
    This is the layout of the setting `scorer: plain`.
    """
    rows = [len(p.prompt) + len(c) - 1 for p in pairs for c in (p.chosen, p.rejected) if c]
    total = len(rows) * (row_width(pairs, PAD_MULTIPLE) - 1)
    return TokenCount(total, total - sum(rows))


def packed_row_tokens(pairs: Sequence[TokenizedPair]) -> TokenCount:
    """Count the input tokens of a forward pass with all pairs packed into one sequence.

    Each prompt is followed by both of its completions, and is therefore counted once.
    """
    tokens = sum(len(p.prompt) + _continuation_tokens(p) for p in pairs)
    return TokenCount(padded_width(tokens), padded_width(tokens) - tokens)


def trie_tokens(pairs: Sequence[TokenizedPair]) -> TokenCount:
    """Count the input tokens of a forward pass over the prefix trie of all texts of `pairs`.

    Whatever several texts begin with is counted once. The count needs the token ids.
    """
    tokens = count_distinct_prefixes(pair_texts(pairs))
    return TokenCount(padded_width(tokens), padded_width(tokens) - tokens)


def shares_prefixes(cost: CountTokens) -> bool:
    """Return whether a pass that `cost` counts runs what its texts begin with only once."""
    return cost is trie_tokens


class DistinctPrefixes:
    """Counts the distinct prefixes of texts that are added one by one."""

    def __init__(self) -> None:
        """Start without texts."""
        self.count = 0
        self._texts: list[Ids] = []  # sorted, so that those with most in common are neighbors

    def add(self, pair: TokenizedPair) -> None:
        """Add the texts of a pair, without the last tokens of its completions."""
        for text in pair_texts([pair]):
            at = bisect_left(self._texts, text)
            near = self._texts[max(0, at - 1) : at + 1]
            self.count += len(text) - max((common_prefix_length(text, t) for t in near), default=0)
            self._texts.insert(at, text)


def shared_prompt_tokens(pairs: Sequence[TokenizedPair], *, together: bool) -> TokenCount:
    """Count the input tokens of a forward pass that processes each prompt only once.

    The last token of a completion is not an input. Pairs with prompts of equal length form a
    batch; with `together`, all pairs form one batch.
    """
    batches: dict[int, list[TokenizedPair]] = {}
    for pair in pairs:
        batches.setdefault(0 if together else len(pair.prompt), []).append(pair)
    total = sum(len(batch) * _shared_width(batch) for batch in batches.values())
    return TokenCount(total, total - sum(len(p.prompt) + _continuation_tokens(p) for p in pairs))


def _continuation_tokens(pair: TokenizedPair) -> int:
    """Return the number of tokens of both completions, without the last token of each."""
    return sum(max(0, len(completion) - 1) for completion in (pair.chosen, pair.rejected))


def _shared_width(pairs: Sequence[TokenizedPair]) -> int:
    """Return the number of tokens, with padding, of each pair's prompt and two completions."""
    prompts = {len(pair.prompt) for pair in pairs}
    is_padded = len(prompts) > 1
    width = padded_width(max(prompts)) if is_padded else max(prompts)
    for longest in (max(len(p.chosen) for p in pairs), max(len(p.rejected) for p in pairs)):
        if longest > 1:
            needed = max(longest - 1, MIN_CONTINUATION)
            width += padded_width(needed) if is_padded else needed
    return width


def row_width(pairs: Sequence[TokenizedPair], multiple: int) -> int:
    """Return the width to which the padded sequences of `pairs` are padded."""
    return round_up(padded_width(max(len(pair) for pair in pairs)), multiple)
