import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.data.batches.order import indices_of_steps, step_indices, steps_per_epoch


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


@pytest.mark.parametrize(("steps", "seen"), [(1, 3), (2, 6), (3, 7), (9, 7)])
def test_pairs_of_the_first_steps_are_those_that_the_steps_see(steps, seen):
    given = {"count": 7, "batch_size": 3, "seed": 5}
    expected = [i for step in range(min(steps, 3)) for i in step_indices(step, **given)]
    found = indices_of_steps(steps, **given)
    assert len(set(found)) == len(found) == seen
    assert found == (expected if steps < 3 else list(range(7)))
