import itertools
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.micro_batches import (
    COUNTED_PAIRS,
    count_micro_batches,
    largest_micro_batch,
    micro_batches,
)
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.data.batches.token_counts import (
    padded_row_tokens,
    shared_prompt_tokens,
    trie_tokens,
)
from mlx_dpo.types import TokenizedPair
from tests.data.batches.pairs import alike_pairs, costs, lengths, limits, of, some_pairs


def test_pairs_of_similar_length_share_a_micro_batch():
    pairs = lengths(2, 40, 2, 10, 50, 2, 2, 50, 2, 10)
    found = micro_batches([7, 3, 4, 1, 9], pairs, PassLimit(pairs=2), cost=padded_row_tokens)
    assert found == [[3, 9], [1, 7], [4]]


def test_ties_keep_their_order_whatever_the_indices():
    pairs = lengths(*[5] * 10)
    assert micro_batches([9, 2, 5], pairs, PassLimit(), cost=padded_row_tokens) == [[9, 2, 5]]


def test_a_micro_batch_is_filled_up_to_its_limit_of_tokens():
    """Rows of 9 tokens are padded to 16, of which 15 are inputs: 30 tokens per pair."""
    pairs = lengths(9, 9, 9, 9, 9)
    for tokens, sizes in ((60, [2, 2, 1]), (59, [1] * 5), (89, [2, 2, 1]), (90, [3, 2])):
        groups = micro_batches(range(5), pairs, PassLimit(tokens=tokens), cost=padded_row_tokens)
        assert [len(group) for group in groups] == sizes


def test_both_limits_apply_together():
    pairs = lengths(9, 9, 9, 17, 17, 17)  # 30 and 46 tokens each
    groups = micro_batches(range(6), pairs, PassLimit(2, 90), cost=padded_row_tokens)
    assert groups == [[0, 1], [2], [3], [4], [5]]


def test_a_pair_above_the_limit_is_a_micro_batch_of_its_own():
    pairs = lengths(90, 3, 100, 3)
    groups = micro_batches(range(4), pairs, PassLimit(tokens=28), cost=padded_row_tokens)
    assert groups == [[1, 3], [0], [2]]


@given(some_pairs, limits, costs, st.integers(1, 9), st.integers(0, 2))
def test_every_pair_is_in_one_micro_batch_of_an_epoch_and_every_micro_batch_is_within_the_limits(
    pairs, limit, cost, batch_size, number
):
    steps = PairOrder(count=len(pairs), batch_size=batch_size, seed=3).epoch_steps(number)
    groups = [g for step in steps for g in micro_batches(step, pairs, limit, cost=cost)]
    assert sorted(index for group in groups for index in group) == list(range(len(pairs)))
    for group in groups:
        assert limit.pairs is None or len(group) <= limit.pairs
        tokens = cost([pairs[i] for i in group]).total
        assert limit.tokens is None or tokens <= limit.tokens or len(group) == 1


@given(some_pairs, limits, costs)
def test_no_micro_batch_has_room_for_the_next_pair(pairs, limit, cost):
    groups = micro_batches(range(len(pairs)), pairs, limit, cost=cost)
    for group, following in itertools.pairwise(groups):
        more = [pairs[i] for i in [*group, following[0]]]
        many = limit.pairs is not None and len(more) > limit.pairs
        assert many or (limit.tokens is not None and cost(more).total > limit.tokens)
    flat = [len(pairs[i]) for group in groups for i in group]
    assert flat == sorted(flat)


def test_a_limit_can_be_multiplied():
    assert PassLimit(2, 100).scaled(4) == PassLimit(8, 400)
    assert PassLimit(tokens=100).scaled(4) == PassLimit(None, 400)


def test_the_largest_micro_batch_has_the_longest_pairs():
    pairs = lengths(9, 40, 17, 80, 33)
    assert largest_micro_batch(pairs, PassLimit(pairs=2), cost=padded_row_tokens) == [
        pairs[3],
        pairs[1],
    ]
    assert largest_micro_batch(pairs, PassLimit(tokens=10), cost=padded_row_tokens) == [pairs[3]]
    two = PassLimit(tokens=2 * 2 * 79)
    assert largest_micro_batch(pairs, two, cost=padded_row_tokens) == [pairs[3], pairs[1]]
    # 79 tokens, and 8 beside them where 39 have no room.
    uneven = [of(1, 8, 1), of(2, 38, 1), of(3, 77, 1)]
    alone = partial(shared_prompt_tokens, together=False)
    assert largest_micro_batch(uneven, PassLimit(tokens=90), cost=alone) == [uneven[2], uneven[0]]


def test_micro_batches_of_an_epoch_are_counted_by_hand():
    """Rows of 8, 16 and 40 tokens, of which all but one are inputs, two rows per pair."""
    pairs = lengths(8, 8, 8, 8, 9, 40)
    order = PairOrder(count=6, batch_size=6, seed=0)
    found = count_micro_batches(pairs, PassLimit(tokens=56), order=order, cost=padded_row_tokens)
    assert found == (1, 3, (4 * 14 + 30 + 78, 4 * (14 - 8) + (30 - 9) + (78 - 40)), 1, 78)


@given(some_pairs, limits, costs, st.integers(1, 9), st.integers(-3, 3))
def test_the_counts_of_an_epoch_are_sums_over_its_steps(pairs, limit, cost, batch_size, seed):
    order = PairOrder(count=len(pairs), batch_size=batch_size, seed=seed)
    groups = [
        g for step in order.epoch_steps(0) for g in micro_batches(step, pairs, limit, cost=cost)
    ]
    known = count_micro_batches(pairs, limit, order=order, cost=cost)
    assert (known.steps, known.micro_batches) == (order.total_steps(1), len(groups))
    passes = [cost([pairs[i] for i in group]) for group in groups]
    assert known.tokens == (sum(p.total for p in passes), sum(p.padding for p in passes))


def test_pairs_that_begin_alike_share_a_micro_batch():
    """By prompt, then by completions, whatever their lengths."""
    prompts = {"a": (1, 1), "b": (1, 2), "b and more": (1, 2, 5), "c": (3,) * 30}
    pairs = [
        TokenizedPair(prompts[name], chosen, rejected)
        for name, chosen, rejected in [
            ("c", (4,), (5,)),
            ("b", (7, 7), (8,)),
            ("a", (6,) * 9, (7,)),
            ("b and more", (4,), (9,)),
            ("b", (7, 6), (8,) * 20),
            ("b", (7, 7), (6,)),
        ]
    ]
    found = micro_batches(range(6), pairs, PassLimit(pairs=2), cost=trie_tokens)
    assert found == [[2, 4], [5, 1], [3, 0]]
    # 1 2, 7 and 8 * 19: 22 tokens; the second pair of the prompt adds none, the third none.
    found = micro_batches([4, 1, 5, 0], pairs, PassLimit(tokens=22), cost=trie_tokens)
    assert found == [[4, 5, 1], [0]]
    found = micro_batches([4, 1, 5, 0], pairs, PassLimit(tokens=21), cost=trie_tokens)
    assert found == [[4], [5, 1], [0]]


@given(alike_pairs, limits, st.randoms())
def test_cuts_by_shared_prefixes_are_within_the_limits_and_full(pairs, limit, random):
    indices = random.sample(range(len(pairs)), len(pairs))
    groups = micro_batches(indices, pairs, limit, cost=trie_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(pairs)))

    def fits(group):
        total = trie_tokens([pairs[i] for i in group]).total
        many = limit.pairs is not None and len(group) > limit.pairs
        return not many and (limit.tokens is None or total <= limit.tokens)

    assert all(fits(group) or len(group) == 1 for group in groups)
    for group, following in itertools.pairwise(groups):
        assert not fits([*group, following[0]])


@given(alike_pairs, limits, st.integers(1, 9), st.integers(0, 3))
def test_no_micro_batch_has_more_distinct_tokens_than_the_largest(pairs, limit, batch_size, seed):
    largest = largest_micro_batch(pairs, limit, cost=trie_tokens)
    bound = trie_tokens(largest).total
    order = PairOrder.of(pairs, batch_size=batch_size, seed=seed, group_by_prompt=True)
    for step in order.epoch_steps(0):
        for group in micro_batches(step, pairs, limit, cost=trie_tokens):
            assert trie_tokens([pairs[i] for i in group]).total <= bound
    assert limit.pairs is None or len(largest) <= limit.pairs


def test_the_largest_micro_batch_shares_nothing_although_the_longest_pairs_do():
    pairs = [TokenizedPair((5,) * 9, (6,) * 3, (6,) * 3) for _ in range(4)]
    assert trie_tokens(pairs).total == 11  # this pass is no bound: others share less
    two = largest_micro_batch(pairs, PassLimit(pairs=2), cost=trie_tokens)
    assert trie_tokens(two) == (2 * (9 + 2 + 2), 0)
    filled = largest_micro_batch(pairs, PassLimit(tokens=33), cost=trie_tokens)
    assert [len(pair) for pair in filled] == [12, 12, 6] and trie_tokens(filled) == (33, 0)


def test_the_largest_micro_batch_fills_up_its_limit_whatever_part_is_long():
    """A short prompt and a completion of one token cannot fill the rest; the long one must."""
    for long in ((2, 30, 1), (2, 1, 30), (31, 1, 1), (2, 16, 15)):
        pairs = [of(*long)] * 2
        for tokens in range(32, 60):
            filled = largest_micro_batch(pairs, PassLimit(tokens=tokens), cost=trie_tokens)
            assert trie_tokens(filled).total == tokens, (long, tokens)


def test_token_ids_of_the_largest_micro_batch_are_in_every_vocabulary():
    """An id beyond the embeddings would read other memory."""
    largest = largest_micro_batch([of(3, 2, 2)] * 600, PassLimit(), cost=trie_tokens)
    assert max(max(pair.prompt + pair.chosen + pair.rejected) for pair in largest) == 255
    assert len({pair.prompt for pair in largest}) == 600


@given(alike_pairs, limits, st.integers(1, 9))
def test_the_counts_of_an_epoch_are_the_distinct_tokens_of_its_micro_batches(
    pairs, limit, batch_size
):
    order = PairOrder.of(pairs, batch_size=batch_size, seed=0, group_by_prompt=True)
    steps = order.epoch_steps(0)
    groups = [g for step in steps for g in micro_batches(step, pairs, limit, cost=trie_tokens)]
    totals = [trie_tokens([pairs[i] for i in group]).total for group in groups]
    alone = [trie_tokens([pair]).total for pair in pairs]
    above = [n for n in alone if limit.tokens is not None and n > limit.tokens]
    found = count_micro_batches(pairs, limit, order=order, cost=trie_tokens)
    expected = (len(steps), len(groups), (sum(totals), 0), len(above), max(above, default=0))
    assert found == expected


def test_an_epoch_of_many_pairs_is_counted_by_its_first_ones():
    """Half as many pairs again as are counted, all of 5 distinct tokens, four of them shared."""
    count = 3 * COUNTED_PAIRS // 2
    pairs = [TokenizedPair((1, 2, 3), (4, 5), (number, 6)) for number in range(10, 10 + count)]
    order = PairOrder(count=count, batch_size=16, seed=0)
    found = count_micro_batches(pairs, PassLimit(pairs=8), order=order, cost=trie_tokens)
    assert found == (count // 16, count // 8, (count // 8 * (4 + 8), 0), 0, 0)
