"""Measures of the study of on-policy data, with values by hand."""

import math

import numpy as np
import pytest

from scripts.studies import on_policy
from scripts.studies.parts.on_policy import runs
from scripts.studies.toy import genres
from scripts.studies.toy.reviews import REWARDS

ANSWERS = len(genres.SPACE.answers)


@pytest.fixture
def world(tmp_path):
    """Return a world whose base gives every answer to every prompt with equal probability."""
    reference = np.full((len(genres.HELD_OUT), ANSWERS), -math.log(ANSWERS))
    return genres.World(0, tmp_path, tmp_path, reference, 1.0)


def test_the_best_reward_at_the_optimum_is_that_of_the_optimum(world):
    reward, kl = world.optimum(0.5)
    assert world.best_reward(kl) == pytest.approx(reward, abs=1e-6)
    assert world.best_reward(1e-6) == pytest.approx(REWARDS.mean(), abs=0.02)


def test_coverage_counts_the_answers_to_the_same_subject(world):
    weights = np.exp(REWARDS) / np.exp(REWARDS).sum()
    pairs = [{"prompt": "horror film", "chosen": "great", "rejected": "bad"}] * 2
    found = weights[[genres.SPACE.index["great"], genres.SPACE.index["bad"]]].sum()
    assert world.coverage(pairs) == pytest.approx(found / 4)  # one of four subjects


def test_annotators_prefer_by_the_bradley_terry_model():
    annotator = genres.Annotator()
    wins = [annotator.judge([], "good") > annotator.judge([], "fine") for _ in range(4000)]
    expected = 1 / (1 + math.exp(-0.5))  # rewards 1 and 0.5
    assert np.mean(wins) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4000))


def test_tilted_reviews_have_odds_of_the_reward():
    people, praise = genres.tilted_reviews(0.0), genres.tilted_reviews(0.7)
    for subject, choices in praise.items():
        assert sum(choices.values()) == pytest.approx(1)
        odds = choices["great"] / choices["bad"]
        before = people[subject]["great"] / people[subject]["bad"]
        assert odds / before == pytest.approx(math.exp(0.7 * 3))  # rewards 2 and -1


def test_other_writers_pair_their_best_and_worst_answer():
    draw = np.random.default_rng(0)
    same = {key: {"fine": 1.0} for key in ("film", "plot", "cast", "music")}
    assert runs.write_pairs(same, 2, draw) == [[], []]  # equal rewards make no pair
    [pairs] = runs.write_pairs({key: {"good": 0.5, "bad": 0.5} for key in same}, 1, draw)
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("good", "bad")}
    assert {pair["prompt"] for pair in pairs} <= set(genres.TRAINING)


def test_equal_kl_compares_with_mixtures_of_no_larger_kl():
    loop = {"method": "loop", "labels": runs.BEST_WORST, "data": "the policy", "end": 1}
    offline = {"method": "offline", "labels": runs.BEST_WORST, "data": "base", "end": 0}
    steps = ({"answers": n, "kl": 1.0 * n, "reward": 1.0 * n, "base_reward": 0} for n in (1, 2, 3))
    rows = [
        *(loop | step for step in steps),
        offline | {"kl": 2.5, "reward": 1.5},
        offline | {"kl": 3.5, "reward": 2.0},
        offline | {"kl": 1.0, "reward": 9.0, "data": "praise"},
    ]
    # Half of each of the two checkpoints has a KL of 3 at most, and the reward 1.75.
    assert on_policy.gain_at_equal_kl(rows) == pytest.approx(3 - 1.75)
