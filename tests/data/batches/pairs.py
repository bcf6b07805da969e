"""Pairs of given lengths, token counts to try, and limits, for the tests of batches."""

from functools import partial

from hypothesis import strategies as st

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.token_counts import padded_row_tokens, shared_prompt_tokens
from mlx_dpo.types import TokenizedPair


def of(prompt, chosen, rejected):
    return TokenizedPair((1,) * prompt, (2,) * chosen, (3,) * rejected)


def lengths(*whole):
    """Return pairs with these numbers of tokens in the longer row."""
    return [of(1, length - 1, 1) for length in whole]


COSTS = [
    padded_row_tokens,
    partial(shared_prompt_tokens, together=False),
    partial(shared_prompt_tokens, together=True),
]
costs = st.sampled_from(COSTS)
some_pairs = st.lists(
    st.builds(of, st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)),
    min_size=1,
    max_size=24,
)
limits = st.builds(
    PassLimit, st.none() | st.integers(1, 6), st.none() | st.integers(1, 400)
)  # of all four kinds
# Few token ids and short texts, so that beginnings of every kind are shared.
parts = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
alike_pairs = st.lists(st.builds(TokenizedPair, parts, parts, parts), min_size=1, max_size=8)
