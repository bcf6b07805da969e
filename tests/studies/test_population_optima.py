"""Closed forms of population optima: values by hand, and minima found by search."""

import numpy as np
import pytest

from scripts.studies.toy import population as p
from scripts.studies.toy.bradley_terry import flip


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def minimum(expected_loss):
    """Return the x with the smallest loss on a fine grid."""
    x = np.linspace(-8, 8, 160_001)
    return x[np.argmin(expected_loss(x))]


def test_logits_and_flipped_labels():
    assert p.logit(np.array(0.8)) == pytest.approx(np.log(4))
    assert flip(np.array(0.9), 0.1) == pytest.approx(0.82)  # 0.9 0.9 + 0.1 0.1
    assert flip(np.array(0.5), 0.3) == 0.5


def test_exo_at_certain_and_at_even_preferences():
    assert p.exo_margin(np.array(1.0), 0.1) == pytest.approx(np.log(9))
    assert p.exo_margin(np.array(0.5), 0.1) == 0
    assert p.exo_margin(np.array(0.75), 0.1) == pytest.approx(np.log(3))


def test_exo_is_the_minimum_of_its_loss():
    def loss(x):  # KL divergence of (σ(x), σ(-x)) from the smoothed labels, p = 0.7, ε = 0.2
        s = np.exp(log_sigmoid(x)), np.exp(log_sigmoid(-x))
        logs = log_sigmoid(x), log_sigmoid(-x)
        right = s[0] * (logs[0] - np.log(0.8)) + s[1] * (logs[1] - np.log(0.2))
        wrong = s[0] * (logs[0] - np.log(0.2)) + s[1] * (logs[1] - np.log(0.8))
        return 0.7 * right + 0.3 * wrong

    assert minimum(loss) == pytest.approx(p.exo_margin(np.array(0.7), 0.2), abs=2e-4)


def test_simpo_without_gamma_is_the_logit():
    assert p.simpo_margin(np.array(0.8), 0.0) == pytest.approx(np.log(4))


def test_simpo_is_the_minimum_of_its_loss():
    def loss(x):
        return -0.7 * log_sigmoid(x - 0.5) - 0.3 * log_sigmoid(-x - 0.5)

    assert minimum(loss) == pytest.approx(p.simpo_margin(np.array(0.7), 0.5), abs=2e-4)


@pytest.mark.parametrize("q", [0.3, 0.8])
def test_bco_and_nca_are_minima_of_their_losses(q):
    def bco(x):
        return -q * log_sigmoid(x) - (1 - q) * log_sigmoid(-x)

    def nca(x):
        return -q * log_sigmoid(x) - 0.5 * log_sigmoid(-x)

    assert minimum(bco) == pytest.approx(p.logit(np.array(q)), abs=2e-4)
    assert minimum(nca) == pytest.approx(np.log(2 * q), abs=2e-4)


def test_ipo_of_a_total_order_and_of_a_cycle():
    order = np.array([[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]])
    assert p.ipo_scores(order).tolist() == pytest.approx([1 / 3, 0, -1 / 3])
    cycle = np.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
    assert p.ipo_scores(cycle).tolist() == pytest.approx([0, 0, 0])


def test_ipo_of_two_answers_has_the_probability_of_the_paper():
    """σ(0.5 / τ) for a uniform reference and certain labels: Azar et al., section 5.3.1."""
    logps = p.ipo_policy(np.array([[0, 1]]), np.log([0.5, 0.5]), target=1 / (2 * 0.5))
    assert np.exp(logps).tolist() == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])


def test_ipo_of_pairs_of_a_total_order():
    """r = (2/3, 0, -2/3) of the target, so that neighbours are closer than it, and ends farther."""
    pairs = np.array([[0, 1], [1, 2], [0, 2]])
    logps = p.ipo_policy(pairs, np.log([0.2, 0.3, 0.5]), target=3.0)
    weights = np.array([0.2 * np.exp(2), 0.3, 0.5 * np.exp(-2)])
    assert np.exp(logps).tolist() == pytest.approx(list(weights / weights.sum()))


def test_ipo_of_pairs_that_contradict_each_other():
    """Two answers stay even, and the one that lost once is the target below both."""
    logps = p.ipo_policy(np.array([[0, 1], [1, 0], [0, 2]]), np.log([1 / 3] * 3), target=2.0)
    assert logps[0] - logps[1] == pytest.approx(0)
    assert logps[0] - logps[2] == pytest.approx(2)


@pytest.mark.parametrize(
    ("name", "generator"),
    [
        ("forward_kl", lambda u: -np.log(u)),
        ("js_divergence", lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2)),
        ("alpha_divergence", lambda u: 4 * (0.5 * (1 + u) - u**0.5)),
    ],
)
def test_scores_are_derivatives_of_the_generators(name, generator):
    u, step = np.array([0.2, 1.0, 5.0]), 1e-6
    slopes = (generator(u + step) - generator(u - step)) / (2 * step)
    assert p.divergence_scores(name, np.log(u)).tolist() == pytest.approx(slopes, abs=1e-6)


def test_threshold_of_kto():
    assert p.kto_threshold(1, 1) == 0.5
    assert p.kto_threshold(1, 2) == pytest.approx(2 / 3)
