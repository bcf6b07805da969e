"""Tests of the exact minima of pairwise losses, with values by hand."""

import math

import numpy as np
import pytest

from scripts.studies.toy import bradley_terry as bt


def test_preferences_are_sigmoids_of_reward_differences() -> None:
    found = bt.preferences(np.array([math.log(3), 0.0]))
    np.testing.assert_allclose(found, [[0.5, 0.75], [0.25, 0.5]])


def test_flips_shrink_shares_and_unflip_restores_them() -> None:
    assert bt.flip(np.array(0.75), 0.2) == pytest.approx(0.65)
    assert bt.unflip(np.array(0.65), 0.2) == pytest.approx(0.75)


def test_unflipped_shares_may_leave_the_unit_interval() -> None:
    assert bt.unflip(np.array(1.0), 0.2) == pytest.approx(4 / 3)


def test_logistic_scores_of_two_answers_are_the_log_odds() -> None:
    found = bt.logistic_scores(np.array([[0.5, 0.8], [0.2, 0.5]]))
    np.testing.assert_allclose(found, [math.log(4) / 2, -math.log(4) / 2])


def test_logistic_scores_of_bradley_terry_shares_are_the_rewards() -> None:
    rewards = np.array([-1.0, 0.25, 0.75])
    np.testing.assert_allclose(bt.logistic_scores(bt.preferences(rewards)), rewards, atol=1e-12)


def test_squared_scores_of_consistent_margins_reproduce_them() -> None:
    margins = np.array([[0.0, 1.0, 3.0], [-1.0, 0.0, 2.0], [-3.0, -2.0, 0.0]])
    found = bt.squared_scores(margins)
    np.testing.assert_allclose(found[:, None] - found[None, :], margins, atol=1e-12)


def test_score_errors_of_two_answers_are_those_of_the_log_odds() -> None:
    # The log-odds of a share 1/2 have variance 4 / labels; each score is half of them.
    found = bt.score_errors(np.zeros(2), rate=0.0, labels=100)
    np.testing.assert_allclose(found, [0.1, 0.1])


def test_flips_multiply_score_errors_by_one_over_one_minus_twice_the_rate() -> None:
    # At equal rewards flips leave the variance of labels at 1/4.
    clean, noisy = (bt.score_errors(np.zeros(3), rate=rate, labels=50) for rate in (0.0, 0.4))
    np.testing.assert_allclose(noisy, 5 * clean)
