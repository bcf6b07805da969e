"""Toy models of the studies: token ids, exact distributions and true rewards."""

import math
from itertools import product

import numpy as np
import pytest

from mlx_dpo import load_policy
from mlx_dpo.data.tokenization.chat_template import tokenize_as_chat
from mlx_dpo.types import PreferenceExample
from scripts.studies.toy import exact, reviews
from scripts.studies.toy.base import make_base
from scripts.studies.toy.train import save_checkpoint, train_by_steps
from scripts.studies.toy.words import ASSISTANT, END, SYSTEM, USER, Words, write_checkpoint

WORDS = Words(("red", "blue", "sky", "sea", "kind"))
ANSWERS = ("red", "red blue", "blue red red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "model", WORDS, seed=0)


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(None, model=str(folder))


@pytest.fixture(scope="module")
def model(policy):
    return policy.model


def test_token_ids_are_those_of_the_package(policy):
    prompt = ({"role": "system", "content": "kind"}, {"role": "user", "content": "sky sea"})
    example = PreferenceExample(prompt, "red blue", "blue", "x")
    parts = tokenize_as_chat(policy.tokenizer, example, thinking=False)
    assert list(parts.prompt) == WORDS.prompt_ids("sky sea", "kind")
    assert [list(ids) for ids in parts.completions] == [
        WORDS.answer_ids("red blue"),
        WORDS.answer_ids("blue"),
    ]


def test_token_ids_by_hand():
    assert WORDS.prompt_ids("sea sky") == [USER, 7, 6, END, ASSISTANT]
    assert WORDS.prompt_ids("sea", "kind") == [SYSTEM, 8, END, USER, 7, END, ASSISTANT]
    assert WORDS.answer_ids("red blue") == [4, 5, END]
    assert len(WORDS) == 9


def test_log_probs_are_those_that_the_trainer_logs(folder, model, tmp_path):
    rows = [{"prompt": "sky sea", "chosen": "red", "rejected": "blue red red"}]
    _, _, row = next(
        train_by_steps(folder, rows, tmp_path / "run", max_steps=1, batch_size=1, learning_rate=0.1)
    )
    chosen, rejected = exact.answer_logps(model, WORDS, "sky sea", ["red", "blue red red"])
    assert row["logps/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert row["logps/rejected"] == pytest.approx(rejected, rel=1e-5)


def test_log_probs_of_an_answer_are_a_sum_over_its_tokens(model):
    ids = [*WORDS.prompt_ids("sky"), *WORDS.answer_ids("red blue")]
    expected = sum(
        exact.next_token_logps(model, [ids[:length]])[0, ids[length]] for length in (4, 5, 6)
    )
    assert ids[4:] == WORDS.answer_ids("red blue")  # its end counts as well
    found = exact.answer_logps(model, WORDS, "sky", ["red", "red blue"])[1]
    assert found == pytest.approx(expected, rel=1e-6)


def test_all_answers_and_the_others_have_probability_one(model):
    space = exact.AnswerSpace(WORDS, ("red", "blue"), longest=3)
    assert len(space.answers) == 2 + 4 + 8 + 1
    for system in (None, "kind"):
        logps = space.logps(model, "sea", system=system)
        assert np.exp(logps).sum() == pytest.approx(1, abs=1e-12)


def test_the_distribution_over_all_answers_is_that_of_single_answers(model):
    space = exact.AnswerSpace(WORDS, ("red", "blue", "kind"), longest=3)
    expected = exact.all_answer_logps(model, WORDS, ("sky", "sea"), space.answers[:-1])
    found = space.all_logps(model, ("sky", "sea"))
    np.testing.assert_allclose(found[:, :-1], expected, rtol=1e-5)
    assert space.index["blue kind red"] == space.answers.index("blue kind red")


def test_a_policy_is_written_as_a_checkpoint(folder, model, tmp_path):
    copy = save_checkpoint(model, folder, tmp_path / "copy")
    expected = exact.answer_logps(model, WORDS, "sky", ANSWERS)
    again = load_policy(None, model=str(copy)).model
    np.testing.assert_array_equal(exact.answer_logps(again, WORDS, "sky", ANSWERS), expected)


@pytest.mark.slow
def test_a_base_gives_the_answers_with_the_given_probabilities(tmp_path):
    shares = {"sky": {"red": 0.6, "red blue": 0.3, "blue red red": 0.1}, "sea": {"blue": 1.0}}
    asked = [("kind", "sky", {"blue": 1.0})]
    base = load_policy(None, model=str(make_base(tmp_path / "b", WORDS, shares, seed=0)))
    for prompt, choices in shares.items():
        logps = exact.answer_logps(base.model, WORDS, prompt, list(choices))
        np.testing.assert_allclose(np.exp(logps), list(choices.values()), atol=0.02)
    praised = make_base(tmp_path / "c", WORDS, shares, seed=0, system=asked)
    space = exact.AnswerSpace(WORDS, ("red", "blue"), longest=1)
    logps = space.logps(load_policy(None, model=str(praised)).model, "sky", system="kind")
    assert np.exp(logps[1]) > 0.95


def test_distances_by_hand():
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    assert exact.total_variation(p, q) == pytest.approx(0.25)
    # 0.5 log 2 + 0.25 log(1/2)
    assert exact.kl_divergence(p, q) == pytest.approx(0.25 * math.log(2))
    assert exact.kl_divergence(p, p) == exact.total_variation(p, p) == 0


def test_distances_are_per_row():
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(exact.total_variation(p, q), [0, 0.4])
    assert exact.kl_divergence(p, q).shape == (2,)


def test_the_optimal_policy_by_hand():
    # π* ∝ (0.75 · e^0, 0.25 · e^{β log 3 / β}) = (0.75, 0.75)
    for beta in (0.1, 2.0):
        rewards = np.array([0.0, beta * math.log(3)])
        found = exact.optimal_policy(np.log([0.75, 0.25]), rewards, beta)
        np.testing.assert_allclose(np.exp(found), [0.5, 0.5])


def test_log_probs_far_from_zero_are_normalized():
    np.testing.assert_allclose(np.exp(exact.normalize(np.array([-1e4, -1e4]))), [0.5, 0.5])


def test_explained_variance_by_hand():
    expected = np.array([-1.0, 0.0, 1.0])
    assert exact.explained_variance(expected + 7, expected) == 1  # a constant does not matter
    assert exact.explained_variance(np.zeros(3), expected) == 0
    assert exact.explained_variance(-expected, expected) == 1 - 8 / 2  # the slope does
    assert exact.explained_variance(2 * expected, expected) == 1 - 2 / 2


@pytest.mark.parametrize(
    ("review", "value"),
    [
        ("great", 2),
        ("very great", 3),
        ("not great", -1.4),
        ("not very bad", 1.05),  # -0.7 · 1.5 · -1
        ("not not good", 0.49),
        ("very very great", 3),  # 4.5, bounded
        ("good and bad", 0),
        ("great but dull", 0.75),
        ("very", -3),
        ("great bad", -3),
        ("great and", -3),
        ("and great", -3),
        ("", -3),
    ],
)
def test_rewards_of_reviews_by_hand(review, value):
    assert reviews.reward(review) == pytest.approx(value)


def test_rewards_are_in_the_order_of_the_answers():
    assert len(reviews.REWARDS) == len(reviews.SPACE.answers) == 10 + 100 + 1000 + 1
    assert reviews.REWARDS[reviews.SPACE.index["not very bad"]] == pytest.approx(1.05)
    assert reviews.REWARDS[-1] == reviews.LOWEST
    assert reviews.REWARDS.min() == reviews.LOWEST and reviews.REWARDS.max() == reviews.HIGHEST


def test_people_write_reviews_only():
    for subject, choices in reviews.human_reviews().items():
        assert subject in reviews.SUBJECTS and set(choices) <= set(reviews.SPACE.answers)
        assert sum(choices.values()) == pytest.approx(1)
        lowest = {review for review in choices if reviews.reward(review) == reviews.LOWEST}
        assert lowest == {"very awful"}  # which is a review, and the worst one


def test_answers_are_all_combinations_of_words():
    space = exact.AnswerSpace(WORDS, ("red", "blue"), longest=2)
    pairs = [" ".join(pair) for pair in product(("red", "blue"), repeat=2)]
    assert space.answers == ["red", "blue", *pairs, exact.OTHER]
