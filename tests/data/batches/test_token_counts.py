import pytest
from hypothesis import given

from mlx_dpo.data.batches.token_counts import TokenCount, padded_row_tokens, shared_prompt_tokens
from tests.data.batches.pairs import costs, of, some_pairs


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
