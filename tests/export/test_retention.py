"""How much of a training is left, on numbers that can be redone on paper."""

import mlx.core as mx
import pytest

from mlx_dpo.export.retention import measure_retention
from mlx_dpo.types import PairLogps, TokenizedPair

PAIRS = [TokenizedPair((1,), (2, 3), (4,)), TokenizedPair((1,), (2,), (4, 5, 6))]


def logps(chosen, rejected):
    return PairLogps(mx.array(chosen), mx.array(rejected))


START = logps([-5.0, -6.0], [-7.0, -8.0])
END = logps([-4.0, -6.0], [-9.0, -9.0])  # chosen +1 and 0, rejected -2 and -1: margins 3 and 1


def test_a_copy_keeps_all_of_it():
    found = measure_retention(PAIRS, START, END, END)
    assert (found.margin_before, found.margin_after, found.margin, found.change) == (2, 2, 1, 1)
    assert (found.mean_difference, found.pairs) == (0, 2)


def test_the_base_keeps_nothing():
    found = measure_retention(PAIRS, START, END, START)
    assert (found.margin, found.change, found.minimum) == (0, 0, 0)
    assert found.mean_difference == pytest.approx(4 / 7)  # 1 + 2 + 1 nats over 2 + 1 + 1 + 3 tokens


def test_a_margin_may_be_kept_by_another_change():
    """Chosen +3 and +1: the margin is the same, and of 1, 0, -2, -1 it is 3 of 6."""
    other = logps([-2.0, -5.0], [-7.0, -8.0])
    found = measure_retention(PAIRS, START, END, other)
    assert found.margin == 1
    assert found.change == pytest.approx(0.5)
    assert found.minimum == pytest.approx(0.5)


def test_a_margin_beyond_the_training_counts_as_well():
    """Chosen +3 and -1, rejected -2 and -1: margins 5 and 0, of 3 and 1; change 6 of 6."""
    other = logps([-2.0, -7.0], [-9.0, -9.0])
    found = measure_retention(PAIRS, START, END, other)
    assert found.margin == pytest.approx(1.25)
    assert found.maximum == max(found.margin, found.change)
    assert found.maximum > 1.1


def test_what_went_beyond_is_no_loss_and_noise_is_no_gain():
    noise = logps([-5.0, -3.0], [-7.0, -8.0])  # where nothing was changed
    assert measure_retention(PAIRS, START, END, noise).change == 0


def test_the_way_back_is_less_than_nothing():
    back = logps([-6.0, -6.0], [-5.0, -7.0])
    assert measure_retention(PAIRS, START, END, back).change == -1


def test_a_policy_that_gained_no_margin_is_measured_by_its_change():
    worse = logps([-6.0, -6.0], [-7.0, -8.0])
    assert measure_retention(PAIRS, START, worse, worse).minimum == 1


def test_judged_answers_have_their_sign():
    rows = [
        TokenizedPair((1,), (2, 3), (9,), desirable=True),
        TokenizedPair((1,), (2,), (9,), desirable=False),
    ]
    end = logps([-4.0, -8.0], [-1.0, -1.0])  # good +1, bad -2; the others' answers do not count
    found = measure_retention(rows, START, end, START)
    assert found.margin_before == pytest.approx(1.5)
    assert found.mean_difference == pytest.approx(1)  # 3 nats over 3 tokens
