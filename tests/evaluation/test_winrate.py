import math
import random

import pytest

from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judge import NO_VERDICT
from mlx_dpo.evaluation.winrate import (
    LENGTH_RIDGE,
    compare_pairwise,
    length_controlled_rate,
    wilson_interval,
    win_rate,
)


def test_wins_ties_and_losses_are_counted_and_a_tie_is_half_a_win():
    rate = win_rate([1, 1, 1, 0.5, 0.5, 0, 1, 1], [0] * 8)
    assert (rate.wins, rate.ties, rate.losses, rate.count) == (5, 2, 1, 8)
    assert rate.rate == 6 / 8


@pytest.mark.parametrize(
    ("won", "count", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_equals_published_wilson_intervals(won, count, low, high):
    assert wilson_interval(won, count) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_the_opponent_is_mirrored():
    low, high = wilson_interval(13.5, 40)
    assert wilson_interval(40 - 13.5, 40) == pytest.approx((1 - high, 1 - low))


def sample(count, seed, prefer, by_length):
    """Outcomes drawn at log-odds prefer + by_length * tanh(d / std)."""
    draw = random.Random(seed)
    lengths = [round(draw.gauss(15, 40)) for _ in range(count)]
    mean = sum(lengths) / count
    std = math.sqrt(sum((d - mean) ** 2 for d in lengths) / count)
    outcomes = []
    for d in lengths:
        p = 1 / (1 + math.exp(-(prefer + by_length * math.tanh(d / std))))
        outcomes.append(float(draw.random() < p))
    return outcomes, lengths


@pytest.mark.parametrize("prefer", [-1.2, -0.7, 0.0])
def test_the_effect_of_length_is_removed(prefer):
    outcomes, lengths = sample(8000, 3, prefer, by_length=2.0)
    raw = sum(outcomes) / len(outcomes)
    wanted = 1 / (1 + math.exp(-prefer))
    assert length_controlled_rate(outcomes, lengths) == pytest.approx(wanted, abs=0.02)
    assert abs(raw - wanted) > 0.05


def test_without_an_effect_of_length_the_rate_is_the_win_rate():
    outcomes, lengths = sample(8000, 4, 0.4, by_length=0.0)
    raw = sum(outcomes) / len(outcomes)
    assert length_controlled_rate(outcomes, lengths) == pytest.approx(raw, abs=0.01)


def test_the_rate_of_the_opponent_is_the_complement():
    outcomes, lengths = sample(60, 5, 0.8, by_length=1.0)
    mirrored = length_controlled_rate([1 - y for y in outcomes], [-d for d in lengths])
    assert mirrored == pytest.approx(1 - length_controlled_rate(outcomes, lengths), abs=1e-9)


def test_the_unit_of_length_does_not_matter():
    outcomes, lengths = sample(60, 6, 0.8, by_length=1.0)
    again = length_controlled_rate(outcomes, [7 * d for d in lengths])
    assert again == pytest.approx(length_controlled_rate(outcomes, lengths), abs=1e-9)


def test_the_fit_minimizes_its_loss():
    """Compared with gradient descent on the penalized likelihood, with the added tie."""
    outcomes, lengths = [1, 0.5, 0, 1, 1, 0, 1], [10, -3, -20, 4, 30, 2, 8]
    mean = sum(lengths) / len(lengths)
    std = math.sqrt(sum((d - mean) ** 2 for d in lengths) / len(lengths))
    points = [(math.tanh(d / std), y) for d, y in zip(lengths, outcomes, strict=True)]
    points.append((0.0, 0.5))
    a = b = 0.0
    for _ in range(20000):
        residuals = [(y - 1 / (1 + math.exp(-(a + b * x))), x) for x, y in points]
        a += 0.05 * sum(r for r, _ in residuals)
        b += 0.05 * (sum(r * x for r, x in residuals) - LENGTH_RIDGE * b)
    assert length_controlled_rate(outcomes, lengths) == pytest.approx(
        1 / (1 + math.exp(-a)), abs=1e-8
    )


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_the_rate_is_finite_if_one_policy_wins_everything(outcome):
    rate = length_controlled_rate([outcome] * 200, list(range(200)))
    assert rate == pytest.approx(outcome, abs=0.02)


def test_a_constant_length_difference_gives_no_length_controlled_rate():
    assert win_rate([1, 0, 1], [5, 5, 5]).length_controlled is None


class SilentJudge:
    """A judge whose replies have no verdict."""

    name, scores_are_rewards = "silent", False
    warnings, judge_replies = (NO_VERDICT,), ("Hm.",)

    def rank(self, prompts, answers):
        return [self] * len(prompts)


def test_equal_answers_do_not_hide_a_judge_without_any_verdict():
    prompts = [make_prompt("a"), make_prompt("b")]
    with pytest.raises(ConfigError, match="silent: the judge gave no verdict on any prompt"):
        compare_pairwise(SilentJudge(), prompts, ["same", "one"], ["same", "other"])
    tied = compare_pairwise(SilentJudge(), prompts, ["same", "one"], ["same", "one"])
    assert (tied.rate.count, tied.rate.ties) == (2, 2)
