import doctest
import math

import mlx.core as mx
import pytest

from mlx_dpo.losses import pairwise
from mlx_dpo.losses.log_ratios import log_ratio_margin
from mlx_dpo.losses.pairwise import sigmoid_loss
from mlx_dpo.types import PairLogps


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("margin", "beta", "eps", "expected"),
    [
        (0.0, 0.1, 0.0, math.log(2)),  # no preference yet
        (10.0, 0.1, 0.0, 0.31326169),  # -log sigmoid(1)
        (-10.0, 0.1, 0.0, 1.31326169),  # -log sigmoid(-1)
        (10.0, 0.1, 0.25, 0.56326169),  # 0.75 * 0.3133 + 0.25 * 1.3133
        (4.0, 0.5, 0.1, 0.32692801),  # 0.9 * 0.12692801 + 0.1 * 2.12692801
    ],
)
def test_sigmoid_loss_by_hand(margin, beta, eps, expected):
    loss = sigmoid_loss(mx.array(margin), beta=beta, label_smoothing=eps)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("margin", [-2000.0, -30.0, 30.0, 2000.0])
def test_far_from_zero_the_loss_is_its_asymptote(margin):
    """-log sigmoid(x) is 0 or -x there; log(sigmoid(x)) would be -inf."""
    loss, grad = mx.value_and_grad(lambda m: sigmoid_loss(m, beta=1.0))(mx.array(margin))
    assert loss.item() == pytest.approx(max(0.0, -margin), abs=1e-6)
    assert grad.item() == pytest.approx(-1.0 if margin < 0 else 0.0, abs=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("margin", [-3.0, 0.0, 4.0])
def test_the_gradient_is_the_closed_form(margin, eps):
    beta = 0.5
    grad = mx.grad(lambda m: sigmoid_loss(m, beta=beta, label_smoothing=eps))(mx.array(margin))
    expected = -beta * ((1 - eps) * sigmoid(-beta * margin) - eps * sigmoid(beta * margin))
    assert grad.item() == pytest.approx(expected, abs=1e-6)


def test_the_smoothed_loss_has_its_minimum_at_the_assumed_noise():
    """With eps labels flipped, the best margin says sigmoid(beta m) = 1 - eps."""
    best = math.log(0.9 / 0.1) / 0.5
    grad = mx.grad(lambda m: sigmoid_loss(m, beta=0.5, label_smoothing=0.1))(mx.array(best))
    assert grad.item() == pytest.approx(0.0, abs=1e-6)


def test_the_margin_is_the_difference_of_log_ratios():
    policy = PairLogps(mx.array([-3.0, -8.0]), mx.array([-5.0, -2.0]))
    reference = PairLogps(mx.array([-4.0, -6.0]), mx.array([-4.5, -3.0]))
    assert log_ratio_margin(policy, reference).tolist() == [1.5, -3.0]


def test_swapping_chosen_and_rejected_flips_the_margin():
    policy = PairLogps(mx.array([-3.0, -8.0]), mx.array([-5.0, -2.0]))
    reference = PairLogps(mx.array([-4.0, -6.0]), mx.array([-4.5, -3.0]))
    swapped = log_ratio_margin(PairLogps(*reversed(policy)), PairLogps(*reversed(reference)))
    assert mx.array_equal(swapped, -log_ratio_margin(policy, reference))


def test_the_example_in_the_docstring_is_correct():
    failed, tried = doctest.testmod(pairwise)
    assert failed == 0 and tried >= 3
