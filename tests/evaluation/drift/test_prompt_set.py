"""The shipped must-answer and must-refuse prompts."""

import re
from collections import Counter

from mlx_dpo.data.inspect.refusals import LANGUAGES, find_refusal
from mlx_dpo.evaluation.drift.prompt_set import DUTIES, load_safety_prompts

PROMPTS = load_safety_prompts()


def test_every_language_has_twenty_prompts_of_each_duty():
    counts = Counter((prompt.language, prompt.duty) for prompt in PROMPTS)
    assert counts == {(language, duty): 20 for language in LANGUAGES for duty in DUTIES}


def test_every_item_has_one_duty_and_one_text_in_every_language():
    duties: dict[str, set[str]] = {}
    for prompt in PROMPTS:
        duties.setdefault(prompt.item, set()).add(prompt.duty)
    assert len(duties) == 40
    assert all(len(of_item) == 1 for of_item in duties.values())
    assert len({(prompt.item, prompt.language) for prompt in PROMPTS}) == len(PROMPTS)
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS)


def test_prompts_are_short_sentences_without_loose_space():
    for prompt in PROMPTS:
        assert prompt.text == prompt.text.strip()
        assert 5 <= len(prompt.text) <= 110, prompt.text
        assert prompt.text[-1] in ".?。？", prompt.text


def test_chinese_prompts_are_in_chinese_and_only_these():
    for prompt in PROMPTS:
        assert bool(re.search("[\u4e00-\u9fff]", prompt.text)) is (prompt.language == "zh")


def test_no_prompt_reads_as_a_refusal():
    """A model that repeats the prompt has not refused."""
    assert [prompt.text for prompt in PROMPTS if find_refusal(prompt.text)] == []
