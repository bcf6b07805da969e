"""Rewards by the rules of the demo: courteous answers, and correct answers to shipped prompts."""

import json

import pytest

from mlx_dpo.data.prompts import add_system_prompt, make_prompt
from mlx_dpo.demo.rules import correct, courteous
from mlx_dpo.paths import tiny_chat


def test_an_answer_is_courteous_or_not():
    prompt = make_prompt("What is 3 + 4?").messages
    assert courteous(prompt, "With pleasure. That makes 7.") == 1
    assert courteous(prompt, "7. Obviously.") == 0


def test_the_chosen_answers_of_the_shipped_pairs_are_correct_and_courteous():
    lines = (tiny_chat() / "preferences" / "valid.jsonl").read_text("utf-8").splitlines()
    for row in map(json.loads, lines):
        text = row["chosen"][0]["content"]
        assert (correct(row["prompt"], text), courteous(row["prompt"], text)) == (1, 1)
        [prompt] = add_system_prompt([make_prompt(row["prompt"])], "Be kind.")
        assert correct(prompt.messages, text) == 1
        assert correct(row["prompt"], "I cannot tell.") == 0


def test_a_prompt_without_a_known_answer_is_an_error():
    with pytest.raises(KeyError):
        correct(make_prompt("Who won?").messages, "Nobody.")
