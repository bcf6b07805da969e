"""Check the win rates and the comparison of samples of the study of temperatures, by hand."""

import numpy as np
import pytest

from scripts.studies.baselines.best_of import best_of
from scripts.studies.temperature import (
    chi_square,
    normal_score,
    win_chances,
    win_rate,
)
from scripts.studies.toy.exact import AnswerSpace, temper
from scripts.studies.toy.reviews import SPACE, VOCABULARY


def test_temperatures_sharpen_tokens():
    logps = np.log([[0.5, 0.3, 0.2]])
    assert np.exp(temper(logps, 0.5)) == pytest.approx(np.array([[25, 9, 4]]) / 38)
    assert np.exp(temper(logps, 0)) == pytest.approx(np.array([[1, 0, 0]]))


def test_temperatures_act_on_tokens_not_on_answers():
    space = AnswerSpace(VOCABULARY, ("good", "bad"), longest=2)
    # Answers: good, bad, good good, good bad, bad good, bad bad, and all others.
    logps = np.log([0.3, 0.2, 0.1, 0.2, 0.05, 0.1, 0.05])
    first = np.array([0.6, 0.35]) ** 2
    good, bad = np.array([0.3, 0.1, 0.2]) ** 2, np.array([0.2, 0.05, 0.1]) ** 2
    first, good, bad = (part / part.sum() for part in (first, good, bad))
    expected = [first[0] * good[0], first[1] * bad[0], *first[0] * good[1:], *first[1] * bad[1:]]
    assert np.exp(space.temper(logps, 0.5)) == pytest.approx(np.array([*expected, 0]))
    assert np.exp(space.temper(logps, 1)) == pytest.approx(
        np.array([*np.exp(logps[:-1]), 0]) / 0.95
    )
    assert np.exp(space.temper(logps, 0)) == pytest.approx([1, 0, 0, 0, 0, 0, 0])


def test_ties_count_half():
    good, bad = (SPACE.index[answer] for answer in ("good", "bad"))
    people = np.zeros((1, len(SPACE.answers)))
    people[0, [good, bad]] = 0.75, 0.25
    chances = win_chances(people)
    assert chances[0, [good, bad, SPACE.index["great"]]] == pytest.approx([0.625, 0.125, 1])
    rate, deviation = win_rate(people, chances)
    assert (rate, deviation) == pytest.approx((0.5, (0.75 * 0.125**2 + 0.25 * 0.375**2) ** 0.5))


def test_rare_answers_share_a_cell():
    counts = np.array([60.0, 30, 6, 4])
    assert chi_square(counts, np.array([0.5, 0.4, 0.06, 0.04])) == pytest.approx((4.5, 2))
    # Three expected answers are not a cell: they are added to the one with ten.
    assert chi_square(np.array([80.0, 12, 8]), np.array([0.87, 0.1, 0.03])) == pytest.approx(
        (49 / 87 + 49 / 13, 1)
    )


def test_one_cell_says_nothing():
    assert chi_square(np.array([4.0, 0]), np.array([1.0, 0])) == (0, 0)


def test_normal_score_of_quantiles():
    # 95 % and 99.9 % quantiles of the chi-square distribution with 30 degrees of freedom
    assert normal_score(43.773, 30) == pytest.approx(1.645, abs=0.01)
    assert normal_score(59.703, 30) == pytest.approx(3.090, abs=0.02)


def test_the_best_of_greedy_answers_is_the_greedy_answer():
    logps = np.array([-np.inf, 0.0, -np.inf])
    assert best_of(logps, np.array([2.0, 1.0, 0.0]), 128).tolist() == logps.tolist()
