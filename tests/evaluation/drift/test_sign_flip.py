"""The exact test on paired counts."""

from itertools import product
from math import comb

import numpy as np
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


def test_noise_is_rarely_significant_although_translations_agree():
    """The test that takes 100 answers as independent is fooled by twenty items that vary."""
    rng, grouped, naive, runs = np.random.default_rng(0), 0, 0, 400
    for _ in range(runs):
        refused = rng.random(20)  # probability that an item is refused, before as after

        def draw(refused=refused):
            common, own = rng.random(20) < refused, rng.random((20, 5)) < refused[:, None]
            return np.where(rng.random((20, 5)) < 0.9, common[:, None], own).astype(int)

        changes = draw() - draw()
        grouped += sign_flip_p_value(changes.sum(axis=1).tolist()) <= 0.025
        naive += mcnemar(int((changes == 1).sum()), int((changes == -1).sum())) <= 0.025
    assert grouped / runs <= 0.03
    assert naive / runs >= 0.15
