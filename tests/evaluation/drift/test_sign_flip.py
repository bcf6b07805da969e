"""The exact test on paired counts."""

from itertools import product
from math import comb

import pytest

from mlx_dpo.evaluation.drift.sign_flip import sign_flip_p_value


def mcnemar(b: int, c: int) -> float:
    """Return the two-sided exact McNemar p-value: a fair coin's tails beyond max(b, c)."""
    n = b + c
    tail = sum(comb(n, k) for k in range(max(b, c), n + 1)) / 2**n
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (6, 1), (3, 3), (20, 0), (9, 2)])
def test_single_items_give_mcnemars_exact_test(b, c):
    assert sign_flip_p_value([1] * b + [-1] * c + [0] * 7) == pytest.approx(mcnemar(b, c))


def test_values_by_hand():
    assert sign_flip_p_value([]) == 1.0
    assert sign_flip_p_value([5]) == 1.0  # one group proves nothing, however many languages it has
    assert sign_flip_p_value([5, 5, 5, 5, 5, 5]) == 2 / 64
    assert sign_flip_p_value([3, 1]) == 2 / 4  # 4 and -4 of 4, 2, -2, -4
    assert sign_flip_p_value([3, -1]) == 4 / 4


@pytest.mark.parametrize("differences", [[5, -3, 2, 2, 1], [4, 4, -5, 1, 0, 2, -1], [1, 2, 3, 4]])
def test_the_convolution_counts_what_enumeration_counts(differences):
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    expected = sum(value >= observed for value in sums) / len(sums)
    assert sign_flip_p_value(differences) == pytest.approx(expected)
    assert sign_flip_p_value([-d for d in differences]) == pytest.approx(expected)
