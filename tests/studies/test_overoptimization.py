"""Check the measures of over-optimization by hand."""

import numpy as np
import pytest

from scripts.studies.overoptimization import (
    IS_LATE,
    MEASURED,
    by_run,
    fit_form,
    largest_drop,
    mean_run,
    rise_and_fall,
)
from scripts.studies.toy.reviews import REWARDS, SPACE, SUBJECTS, sample_pairs


def test_rise_to_the_peak_and_fall_to_the_late_mean():
    late = IS_LATE
    rewards = np.where(late, 1.0, 2.0)
    rewards[:4] = 0.5, 1, 2, 5
    # The highest mean of three measurements is that of 2, 5 and 2.
    assert rise_and_fall(rewards) == pytest.approx((2.5, 2))


def test_largest_drop_is_from_an_earlier_value():
    assert largest_drop(np.array([0.0, 2, 1, 3, 2.5, 0.5, 4])) == 2.5


def test_fit_finds_the_form():
    distances = np.array([0.2, 0.5, 1.0, 1.5, 2.0])
    gains = distances * (1.5 - 0.7 * np.log(distances))
    assert fit_form(distances, gains) == pytest.approx((1.5, 0.7, 1))


def test_runs_are_averaged_at_equal_steps():
    rows = [
        {"seed": seed, "loss": "ipo", "step": step, "kl": float(seed + step)}
        for seed in (0, 2)
        for step in MEASURED
    ]
    assert [len(run) for run in by_run(rows, loss="ipo")] == [len(MEASURED)] * 2
    assert mean_run(rows, "kl", loss="ipo") == pytest.approx(1 + np.array(MEASURED))


def test_pairs_follow_the_bradley_terry_model():
    logps = np.full((len(SUBJECTS), len(SPACE.answers)), -np.inf)
    good, bad = (SPACE.index[answer] for answer in ("good", "dull"))
    logps[:, [good, bad]] = np.log(0.5)
    assert REWARDS[[good, bad]].tolist() == [1.0, -0.5]
    pairs = sample_pairs(logps, 600, np.random.default_rng(0))
    assert [pair["prompt"] for pair in pairs[:5]] == [*SUBJECTS, SUBJECTS[0]]
    share = np.mean([pair["chosen"] == "good" for pair in pairs])
    assert share == pytest.approx(1 / (1 + np.exp(-1.5)), abs=0.05)
