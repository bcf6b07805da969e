"""Tests of the enumeration of samples and of the data of the study of length."""

from pathlib import Path

import numpy as np
import pytest

from mlx_dpo import load_policy
from scripts.studies.toy.exact import answer_logps
from scripts.studies.toy.fillers import pair_lengths, sample_pairs
from scripts.studies.toy.sampling import enumerate_samples
from scripts.studies.toy.words import Words, write_checkpoint

VOCABULARY = Words(("red", "blue", "sky"))


def test_samples_have_the_exact_probabilities_of_answers(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", VOCABULARY, seed=0)
    model = load_policy(None, model=str(folder)).model
    found = enumerate_samples(model, VOCABULARY, "sky", longest=3, smallest=1e-30)
    listed = ["red", "red blue", "blue"]
    expected = np.exp(answer_logps(model, VOCABULARY, "sky", listed))
    np.testing.assert_allclose([found.answers[text] for text in listed], expected, rtol=1e-4)
    assert len(found.answers) == 1 + 3 + 9 + 27  # with the empty one
    assert sum(found.answers.values()) + found.rest == pytest.approx(1)


def test_long_answers_are_cut_with_the_probability_of_their_beginning(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", VOCABULARY, seed=0)
    model = load_policy(None, model=str(folder)).model
    short, long = (
        enumerate_samples(model, VOCABULARY, "sky", longest=n, smallest=1e-30) for n in (1, 2)
    )
    ends = sum(p for text, p in long.answers.items() if text.split()[:1] == ["red"])
    special = long.rest - short.rest  # special tokens after the first word
    assert ends <= short.answers["red"] <= ends + special + 1e-9


def test_both_orders_of_a_pair_share_the_label() -> None:
    content, rewards = np.full((3, 4), 0.25), np.zeros((3, 4))
    pairs = list(sample_pairs(content, rewards, 0.0, seed=0))
    assert {pair["share"] for pair in pairs} == {1.0}
    facts = pair_lengths(pairs)
    assert facts["chosen_words"] == facts["rejected_words"]
    assert facts["chosen_longer"] == 0.5


def test_a_length_bias_makes_chosen_answers_longer() -> None:
    content, rewards = np.full((3, 4), 0.25), np.zeros((3, 4))
    facts = pair_lengths(list(sample_pairs(content, rewards, 0.1, seed=0)))
    assert facts["chosen_words"] > facts["rejected_words"]
    assert 0.5 < facts["chosen_longer"] < 0.6
