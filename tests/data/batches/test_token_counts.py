import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given

from mlx_dpo.data.batches.token_counts import (
    DistinctPrefixes,
    TokenCount,
    packed_row_tokens,
    padded_row_tokens,
    shared_prompt_tokens,
    trie_tokens,
)
from mlx_dpo.data.columns import PairLengthsView
from mlx_dpo.types import TokenizedPair
from tests.data.batches.pairs import alike_pairs, costs, of, some_pairs


def test_padded_rows_count_two_rows_without_the_last_token():
    """Rows of 5, 8 and 17 tokens: width 24, of which 23 are inputs."""
    pairs = [of(3, 2, 1), of(1, 7, 7), of(10, 7, 1)]
    assert padded_row_tokens(pairs) == (6 * 23, 6 * 23 - (4 + 3) - (7 + 7) - (16 + 10))


def test_a_shared_prompt_counts_once_and_last_tokens_do_not_count():
    assert shared_prompt_tokens([of(7, 5, 3)], together=False) == (7 + 4 + 2, 0)
    assert shared_prompt_tokens([of(7, 1, 1)], together=False) == (7, 0)
    # A single token after a cache is padded to two.
    assert shared_prompt_tokens([of(7, 2, 1)], together=False) == (7 + 2, 1)


@pytest.mark.parametrize(
    ("together", "tokens"),
    [
        (False, TokenCount(2 * (4 + 4 + 2) + (9 + 6), 2)),
        (True, TokenCount(3 * (9 + 6 + 2), (5 + 5) + (2 + 4) + 2)),
    ],
)
def test_prompts_of_equal_length_are_a_batch_or_all_are(together, tokens):
    pairs = [of(4, 5, 3), of(9, 7, 1), of(4, 3, 3)]
    assert shared_prompt_tokens(pairs, together=together) == tokens


@given(some_pairs, costs)
def test_counts_never_fall_when_a_pair_is_added_and_padding_is_the_rest(pairs, cost):
    assert cost(pairs[:-1] or pairs).total <= cost(pairs).total
    rows = 2 if cost is padded_row_tokens else 1
    real = sum(rows * len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs)
    assert cost(pairs) == (cost(pairs).total, cost(pairs).total - real)


def distinct_prefixes(pairs):
    """Every prefix of every text as a set: what a pass that shares all of them runs."""
    texts = [p.prompt + completion[:-1] for p in pairs for completion in (p.chosen, p.rejected)]
    return len({text[:end] for text in texts for end in range(1, len(text) + 1)})


@given(alike_pairs)
def test_a_trie_has_every_distinct_prefix_once(pairs):
    assert trie_tokens(pairs) == (distinct_prefixes(pairs), 0)
    assert trie_tokens(pairs).total <= packed_row_tokens(pairs).total
    prefixes = DistinctPrefixes()
    for number, pair in enumerate(pairs, start=1):
        prefixes.add(pair)
        assert prefixes.count == distinct_prefixes(pairs[:number])


def test_a_trie_counts_by_hand_and_pads_on_a_gpu(monkeypatch):
    """A prompt of 3, completions that share 2 of their tokens, and a second pair that adds 1."""
    pairs = [
        TokenizedPair((1, 2, 3), (4, 5, 6, 7), (4, 5, 8)),  # 1 2 3, 4 5, 6: the 8 predicts nothing
        TokenizedPair((1, 2, 3), (4, 5, 6, 9), (4, 6, 8)),  # 4 5 6 is there, 4 6 adds one
    ]
    assert trie_tokens(pairs[:1]) == (6, 0)
    assert trie_tokens(pairs) == (7, 0)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert trie_tokens(pairs) == (8, 1)


def test_lengths_alone_are_refused_where_a_count_needs_the_tokens():
    [pair] = PairLengthsView(np.array([[3, 2, 2]]))
    with pytest.raises(TypeError):
        trie_tokens([pair])
