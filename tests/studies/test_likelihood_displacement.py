"""The helpers of the study of likelihood displacement, with values by hand."""

import numpy as np
import pytest

from scripts.studies.baselines.ches import ches, edit_distance, last_similarity
from scripts.studies.parts.likelihood_displacement.one_token import slope_term
from scripts.studies.toy.exact import rank_correlation

CHOSEN, REJECTED = np.array([[1.0, 0.0], [1.0, 2.0]]), np.array([[3.0, 1.0]])


def test_ches_is_the_inner_product_of_sums_minus_the_squared_norm():
    assert ches(CHOSEN, REJECTED) == 8 - 8
    assert ches(CHOSEN, CHOSEN) == 0


def test_normalized_ches_takes_means():
    assert ches(CHOSEN, REJECTED, normalized=True) == 4 - 2


def test_last_similarity_is_the_inner_product_of_the_last_states():
    assert last_similarity(CHOSEN, REJECTED) == 5


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("a b c", "a b c", 0), ("a b c", "a x c", 1 / 3), ("a b", "b a c d", 3 / 4), ("a", "b c", 1)],
)
def test_edit_distance_is_a_share_of_the_longer_answer(one, other, distance):
    assert edit_distance(one, other) == distance


def test_rank_correlation_gives_ties_their_mean_rank():
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert rank_correlation([0, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_slope_term_is_minus_the_derivative_of_the_chosen_log_prob():
    head = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0]])
    state, step = np.array([0.3, -0.2]), 1e-6

    def logps(hidden):
        logits = head @ hidden
        return logits - np.log(np.exp(logits).sum())

    direction = head[0] - head[1]
    slope = (logps(state + step * direction)[0] - logps(state)[0]) / step
    assert slope_term(head, np.exp(logps(state)), 0, 1) == pytest.approx(-slope, abs=1e-5)
