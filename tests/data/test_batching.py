import itertools
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batching import (
    TokenCount,
    collate,
    count_micro_batches,
    indices_of_steps,
    largest_micro_batch,
    micro_batches,
    padded_row_tokens,
    padded_width,
    shared_prompt_tokens,
    step_indices,
    steps_per_epoch,
)
from mlx_dpo.types import TokenizedPair

PAIRS = [
    TokenizedPair(prompt=(1, 2, 3), chosen=(10, 11), rejected=(20,)),
    TokenizedPair(prompt=(4,), chosen=(12, 13, 14, 15), rejected=(21, 22)),
]


def epoch(number, *, count, batch_size, seed):
    steps = steps_per_epoch(count, batch_size)
    return [
        step_indices(step, count=count, batch_size=batch_size, seed=seed)
        for step in range(number * steps, (number + 1) * steps)
    ]


@pytest.mark.parametrize(
    ("count", "batch_size", "steps"), [(1, 1, 1), (8, 4, 2), (9, 4, 3), (3, 16, 1)]
)
def test_the_last_step_of_an_epoch_has_the_remainder(count, batch_size, steps):
    assert steps_per_epoch(count, batch_size) == steps


@given(st.integers(1, 40), st.integers(1, 16), st.integers(-5, 2**65), st.integers(0, 3))
def test_every_pair_is_used_once_per_epoch(count, batch_size, seed, number):
    steps = epoch(number, count=count, batch_size=batch_size, seed=seed)
    assert sorted(index for step in steps for index in step) == list(range(count))
    assert all(len(step) == batch_size for step in steps[:-1])
    assert len(steps[-1]) == count - batch_size * (len(steps) - 1)


def test_every_epoch_and_seed_has_its_own_order():
    orders = {
        (seed, number): str(epoch(number, count=20, batch_size=6, seed=seed))
        for seed in (0, 1, -1)
        for number in (0, 1)
    }
    assert len(set(orders.values())) == 6


def test_the_order_is_the_same_on_every_machine():
    """NumPy's permutation of seed 7 and epoch 1, split by hand: a resumed run depends on it."""
    order = np.random.default_rng([7, 1]).permutation(5).tolist()
    assert step_indices(3, count=5, batch_size=2, seed=7) == order[:2]
    assert step_indices(5, count=5, batch_size=2, seed=7) == order[4:]
    assert order == [3, 0, 2, 1, 4]


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


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


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
    steps = epoch(number, count=len(pairs), batch_size=batch_size, seed=3)
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


def test_on_the_cpu_widths_are_not_padded():
    assert [padded_width(length) for length in (1, 13, 1000)] == [1, 13, 1000]


def test_on_a_gpu_there_are_few_widths_and_little_padding(on_a_gpu):
    widths = [padded_width(length) for length in range(1, 16_385)]
    assert widths == sorted(widths)
    assert len(set(widths)) < 70
    assert all(width % 8 == 0 for width in widths)
    for length, width in enumerate(widths, start=1):
        assert length <= width <= length + length / 8 + 7
    powers = [2**n for n in range(3, 15)]
    assert [padded_width(power) for power in powers] == powers  # usual limits cost nothing


def test_on_a_gpu_padded_batches_have_one_of_these_widths(on_a_gpu):
    assert collate([of(300, 9, 2)]).tokens.shape == (2, 320)
    assert padded_row_tokens([of(300, 9, 2)]).total == 2 * 319
    assert shared_prompt_tokens([of(300, 41, 2)], together=True).total == 300 + 40 + 2
    both = [of(300, 41, 2), of(9, 2, 2)]
    assert shared_prompt_tokens(both, together=True).total == 2 * (320 + 40 + 8)
    assert shared_prompt_tokens(both, together=False).total == (300 + 40 + 2) + (9 + 2 + 2)


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
    found = count_micro_batches(
        pairs, PassLimit(tokens=56), batch_size=6, seed=0, cost=padded_row_tokens
    )
    assert found == (1, 3, (4 * 14 + 30 + 78, 4 * (14 - 8) + (30 - 9) + (78 - 40)), 1, 78)


@given(some_pairs, limits, costs, st.integers(1, 9), st.integers(-3, 3))
def test_the_counts_of_an_epoch_are_sums_over_its_steps(pairs, limit, cost, batch_size, seed):
    steps = epoch(0, count=len(pairs), batch_size=batch_size, seed=seed)
    groups = [g for step in steps for g in micro_batches(step, pairs, limit, cost=cost)]
    known = count_micro_batches(pairs, limit, batch_size=batch_size, seed=seed, cost=cost)
    assert (known.steps, known.micro_batches) == (len(steps), len(groups))
    passes = [cost([pairs[i] for i in group]) for group in groups]
    assert known.tokens == (sum(p.total for p in passes), sum(p.padding for p in passes))


def test_rows_are_all_chosen_then_all_rejected_padded_on_the_right():
    batch = collate(PAIRS, pad_multiple=1)
    assert batch.tokens.tolist() == [
        [1, 2, 3, 10, 11],
        [4, 12, 13, 14, 15],
        [1, 2, 3, 20, 0],
        [4, 21, 22, 0, 0],
    ]
    assert batch.completion_mask.tolist() == [
        [False, False, False, True, True],
        [False, True, True, True, True],
        [False, False, False, True, False],
        [False, True, True, False, False],
    ]
    assert (str(batch.tokens.dtype), str(batch.completion_mask.dtype)) == (
        "mlx.core.int32",
        "mlx.core.bool",
    )


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (5, 5), (4, 8), (8, 8), (32, 32)])
def test_the_width_is_rounded_up_and_no_padding_is_scored(multiple, width):
    batch = collate(PAIRS, pad_multiple=multiple)
    assert batch.tokens.shape == batch.completion_mask.shape == (4, width)
    assert batch.completion_mask.sum(axis=1).tolist() == [2, 4, 1, 2]
    assert batch.tokens.sum(axis=1).tolist() == [27, 58, 26, 47]


@pytest.mark.parametrize(("steps", "seen"), [(1, 3), (2, 6), (3, 7), (9, 7)])
def test_pairs_of_the_first_steps_are_those_that_the_steps_see(steps, seen):
    given = {"count": 7, "batch_size": 3, "seed": 5}
    expected = [i for step in range(min(steps, 3)) for i in step_indices(step, **given)]
    found = indices_of_steps(steps, **given)
    assert len(set(found)) == len(found) == seen
    assert found == (expected if steps < 3 else list(range(7)))
