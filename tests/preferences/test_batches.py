import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.preferences.batches import collate, micro_batches, step_indices, steps_per_epoch
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
def test_an_epoch_has_room_for_the_remainder(count, batch_size, steps):
    assert steps_per_epoch(count, batch_size) == steps


@given(st.integers(1, 40), st.integers(1, 16), st.integers(-5, 2**65), st.integers(0, 3))
def test_every_pair_comes_exactly_once_an_epoch(count, batch_size, seed, number):
    steps = epoch(number, count=count, batch_size=batch_size, seed=seed)
    assert sorted(index for step in steps for index in step) == list(range(count))
    assert all(len(step) == batch_size for step in steps[:-1])
    assert len(steps[-1]) == count - batch_size * (len(steps) - 1)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        (seed, number): str(epoch(number, count=20, batch_size=6, seed=seed))
        for seed in (0, 1, -1)
        for number in (0, 1)
    }
    assert len(set(orders.values())) == 6


def test_the_order_is_the_same_on_every_machine():
    """NumPy's own permutation of seed 7 and epoch 1, cut by hand: a resumed run depends on it."""
    order = np.random.default_rng([7, 1]).permutation(5).tolist()
    assert step_indices(3, count=5, batch_size=2, seed=7) == order[:2]
    assert step_indices(5, count=5, batch_size=2, seed=7) == order[4:]
    assert order == [3, 0, 2, 1, 4]


def test_pairs_of_like_length_go_together():
    assert micro_batches([7, 3, 9, 1, 4], [50, 10, 50, 40, 10], size=2) == [[3, 4], [1, 7], [9]]


def test_ties_keep_their_order_whatever_the_indices():
    assert micro_batches([9, 2, 5], [1, 1, 1], size=8) == [[9, 2, 5]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 6))
def test_grouping_loses_nothing_and_pads_no_more_than_any_order(lengths, size):
    groups = micro_batches(range(len(lengths)), lengths, size=size)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == size for group in groups[:-1])
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(lengths)


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
