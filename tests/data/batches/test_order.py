from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.data.batches.order import PairOrder, group_numbers, prompt_numbers
from mlx_dpo.types import NO_LIST, TokenizedPair


def epoch(number, *, count, batch_size, seed):
    steps = PairOrder(count=count, batch_size=batch_size, seed=0).total_steps(1)
    return [
        PairOrder(count=count, batch_size=batch_size, seed=seed).step(step)
        for step in range(number * steps, (number + 1) * steps)
    ]


@pytest.mark.parametrize(
    ("count", "batch_size", "steps"), [(1, 1, 1), (8, 4, 2), (9, 4, 3), (3, 16, 1)]
)
def test_the_last_step_of_an_epoch_has_the_remainder(count, batch_size, steps):
    assert PairOrder(count=count, batch_size=batch_size, seed=0).total_steps(1) == steps


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
    assert PairOrder(count=5, batch_size=2, seed=7).step(3) == order[:2]
    assert PairOrder(count=5, batch_size=2, seed=7).step(5) == order[4:]
    assert order == [3, 0, 2, 1, 4]


@pytest.mark.parametrize(("steps", "seen"), [(1, 3), (2, 6), (3, 7), (9, 7)])
def test_pairs_of_the_first_steps_are_those_that_the_steps_see(steps, seen):
    given = {"count": 7, "batch_size": 3, "seed": 5}
    expected = [i for step in range(min(steps, 3)) for i in PairOrder(**given).step(step)]
    found = PairOrder(**given).first_steps(steps)
    assert len(set(found)) == len(found) == seen
    assert found == (expected if steps < 3 else list(range(7)))


@pytest.mark.parametrize(
    ("step", "count", "batch_size", "seed", "indices"),
    [
        (0, 11, 4, 42, [6, 7, 0, 10]),
        (2, 11, 4, 42, [9, 1, 8]),
        (3, 11, 4, 42, [0, 7, 4, 9]),
        (5, 11, 4, 42, [10, 6, 5]),
        (1, 6, 4, 0, [0, 1]),
    ],
)
def test_pairs_shuffled_one_by_one_keep_the_order_of_version_0_1(
    step, count, batch_size, seed, indices
):
    """Recorded before prompts could be grouped; runs that began then are resumed."""
    order = PairOrder(count=count, batch_size=batch_size, seed=seed)
    assert order.step(step) == indices


# Seed 3 and epoch 0 permute 7 pairs to 5 6 2 1 4 3 0, and give 3 prompts the places 1 0 2.
PROMPTS = np.array([0, 0, 1, 2, 1, 0, 2])


@pytest.mark.parametrize(
    ("batch_size", "whole", "steps"),
    [
        (4, False, [[2, 4, 5, 1], [0, 6, 3]]),
        (4, True, [[2, 4], [5, 1, 0], [6, 3]]),
        (5, True, [[2, 4, 5, 1, 0], [6, 3]]),
        (2, True, [[2, 4], [5, 1, 0], [6, 3]]),  # a prompt of three pairs is a step of its own
        (7, True, [[2, 4, 5, 1, 0, 6, 3]]),
    ],
)
def test_prompts_are_shuffled_and_their_pairs_stay_together(batch_size, whole, steps):
    order = PairOrder(count=7, batch_size=batch_size, seed=3, prompts=PROMPTS, whole_prompts=whole)
    assert order.epoch_steps(0) == steps
    assert [order.step(number) for number in range(len(steps))] == steps
    assert order.count_oversized_prompts() == (batch_size == 2)


prompts_of_pairs = st.lists(st.integers(0, 6), min_size=1, max_size=40).map(
    lambda values: np.unique(values, return_inverse=True)[1]
)


@given(prompts_of_pairs, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_grouped_epochs_have_every_pair_once_and_no_prompt_twice(prompts, batch_size, seed, whole):
    order = PairOrder(
        count=len(prompts), batch_size=batch_size, seed=seed, prompts=prompts, whole_prompts=whole
    )
    epochs = [order.epoch_steps(number) for number in range(3)]
    for steps in epochs:
        flat = [index for step in steps for index in step]
        assert sorted(flat) == list(range(len(prompts)))
        changes = np.count_nonzero(np.diff(prompts[flat]))
        assert changes == len(set(prompts.tolist())) - 1
        of_steps = [set(prompts[step].tolist()) for step in steps]
        if whole:
            assert sum(map(len, of_steps)) == len(set(prompts.tolist()))
            assert all(
                len(step) <= batch_size or len(p) == 1
                for step, p in zip(steps, of_steps, strict=True)
            )
        else:
            assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    every = [step for steps in epochs for step in steps]
    assert order.total_steps(3) == len(every)
    assert [order.step(number) for number in range(len(every))] == every
    # The share of pairs seen, also inside an epoch whose steps differ in size.
    seen = np.cumsum([0, *map(len, every)]) / len(prompts)
    assert [order.epochs_after(n) for n in range(len(every) + 1)] == pytest.approx(seen.tolist())
    middle = len(epochs[0]) // 2
    assert order.first_steps(middle) == [i for step in epochs[0][:middle] for i in step]
    assert order.first_steps(len(epochs[0])) == list(range(len(prompts)))


def test_equal_prompts_have_equal_numbers_in_the_order_of_the_pairs():
    prompts = ((7, 8), (3,), (7, 8), (9,), (3,))
    pairs = [TokenizedPair(prompt, (1,), (number,)) for number, prompt in enumerate(prompts)]
    assert prompt_numbers(pairs).tolist() == [0, 1, 0, 2, 1]
    grouped = PairOrder.of(pairs, batch_size=2, seed=0, group_by_prompt=True)
    assert grouped.prompts.tolist() == [0, 1, 0, 2, 1] and not grouped.whole_prompts
    assert PairOrder.of(pairs, batch_size=2, seed=0).prompts is None
    whole = PairOrder.of(pairs, batch_size=2, seed=0, whole_prompts=True)
    assert whole.whole_prompts and whole.prompts is not None


def test_copies_of_a_pair_are_in_groups_of_their_own():
    """A step would otherwise have the same pair again and again."""
    a, b, other = (TokenizedPair((7, 8), (1,), (n,)) for n in (2, 3, 4))
    c = TokenizedPair((9,), (1,), (2,))
    # The prompt 7 8 has groups 0 (a, b, other), 2 and 3; the prompt 9 has groups 1 and 4.
    assert group_numbers([a, b, c, a, b, other, a, c]).tolist() == [0, 0, 1, 2, 2, 0, 3, 4]
    kto = [replace(c, rejected=(n,), desirable=True) for n in (5, 6)]  # borrowed completions
    assert group_numbers(kto).tolist() == [0, 1]


def test_a_list_with_equal_completions_stays_whole_and_its_copy_is_another_group():
    ranked = [
        TokenizedPair((7,), (1,), (2,), ranking=NO_LIST._replace(list_id=5, chosen=n, rejected=2))
        for n in (0, 1)
    ]
    assert group_numbers([*ranked, *ranked]).tolist() == [0, 0, 1, 1]


def test_whole_prompts_need_the_numbers_of_the_prompts():
    with pytest.raises(ValueError, match="whole_prompts"):
        PairOrder(count=3, batch_size=2, seed=0, whole_prompts=True)
