"""Arrays of ranks add up to the bits that one process gets by adding them one after the other."""

import pytest


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sum_over_ranks_has_the_bits_of_a_left_fold(pools, count):
    """Over borders of chunks, dtypes, NaN, infinities, -0.0, and ranks without a pass."""
    for failures in pools[count].values("add_random_arrays", seed=count, cases=60):
        assert failures == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_many_sums_over_ranks_have_the_bits_of_a_left_fold(pools, count):
    for failures in pools[count].values("add_random_arrays", seed=10 + count, cases=2000):
        assert failures == []
