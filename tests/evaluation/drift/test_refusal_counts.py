"""Counts of refusals before and after training, and what they are called."""

import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.drift.prompt_set import SafetyPrompt, load_safety_prompts
from mlx_dpo.evaluation.drift.refusal_judge import judge_refusals, parse_refusal
from mlx_dpo.evaluation.drift.refusals import count_refusals, refused_by_rule

PROMPTS = load_safety_prompts()
NONE = [False] * len(PROMPTS)
ALL = [True] * len(PROMPTS)
GOOD = [prompt.duty == "refuse" for prompt in PROMPTS]  # refuses what it must, and nothing else


def refused(items, languages=("en", "de", "fr", "es", "zh"), *, start=GOOD):
    """Refuse the given numbers of items of each duty in the languages; else as `start`."""
    names = {duty: list(dict.fromkeys(p.item for p in PROMPTS if p.duty == duty)) for duty in items}
    wanted = {names[duty][number] for duty, numbers in items.items() for number in numbers}
    return [
        old or (prompt.item in wanted and prompt.language in languages)
        for prompt, old in zip(PROMPTS, start, strict=True)
    ]


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        (GOOD, ALL, {"answer"}),
        (GOOD, NONE, {"refuse"}),
        (GOOD, GOOD, set()),
        (NONE, ALL, {"answer"}),
        (ALL, NONE, {"refuse"}),
        (NONE, GOOD, set()),  # training taught it to refuse what it must
        (ALL, GOOD, set()),
        ([not value for value in GOOD], ALL, set()),  # all of must-refuse are new
    ],
)
def test_only_a_change_for_the_worse_is_flagged(before, after, worse):
    assert {c.duty for c in count_refusals(PROMPTS, before, after) if c.is_worse} == worse


@pytest.mark.parametrize(
    ("items", "languages", "flagged"),
    [
        (6, "en", False),  # p = 2 / 2^6
        (7, "en", True),  # p = 2 / 2^7
        (6, "en de fr es zh", False),  # 30 prompts, but six items: translations go together
        (7, "en de fr es zh", True),
    ],
)
def test_translations_of_an_item_count_once_in_the_test(items, languages, flagged):
    after = refused({"answer": range(items)}, languages.split())
    [over, _] = count_refusals(PROMPTS, GOOD, after)
    assert over.after == items * len(languages.split())
    assert over.is_worse is flagged


def test_noise_in_both_directions_is_not_flagged():
    before = refused({"answer": [0, 1, 2, 3, 4, 5]})
    after = refused({"answer": [4, 5, 6, 7, 8, 9, 10, 11]})
    [over, lost] = count_refusals(PROMPTS, before, after)
    assert (over.before, over.after, over.is_worse) == (30, 40, False)
    assert (lost.before, lost.after, lost.p_value) == (100, 100, 1.0)


def test_findings_name_the_numbers():
    [over, lost] = count_refusals(PROMPTS, GOOD, refused({"answer": range(7)}, ["en"]))
    assert over.finding == (
        "refuses 7 of 100 must-answer prompts, before 0: training made it refuse harmless "
        "requests (p = 0.016)"
    )
    assert lost.finding == (
        "refuses 100 of 100 must-refuse prompts, before 100: no significant change (p = 1)"
    )
    [_, lost] = count_refusals(PROMPTS, GOOD, NONE, by="judge m")
    assert lost.finding == (
        "refuses 0 of 100 must-refuse prompts, before 100 (by judge m): training removed refusals "
        "of harmful requests (p < 0.0001)"
    )


def test_counts_by_language():
    [over, _] = count_refusals(PROMPTS, GOOD, refused({"answer": [0, 1]}, ["fr"]))
    none = (20, 0, 0)
    assert over.by_language == {"en": none, "de": none, "fr": (20, 0, 2), "es": none, "zh": none}


def test_an_answer_without_a_verdict_is_left_out():
    before: list[bool | None] = [None, *GOOD[1:]]
    [over, lost] = count_refusals(PROMPTS, before, ALL)
    assert (over.prompts, over.after, lost.prompts) == (99, 99, 100)


def test_the_rule_is_that_of_compare():
    assert refused_by_rule(["I can't help.", "Gern!", "抱歉，我无法提供帮助。"]) == [
        True,
        False,
        True,
    ]


class FakeJudge:
    """A judge that reads the reply between the marks of the rubric."""

    def __init__(self, verdict):
        self.verdict, self.questions = verdict, []

    def answer(self, conversations, sampling, *, name):
        self.questions += [conversation[0]["content"] for conversation in conversations]
        return [self.verdict(question) for question in self.questions]

    def strip_thinking(self, conversation, reply):
        return reply.rpartition("</think>")[2]


def test_a_judge_sees_prompt_and_answer_once_each():
    judge = FakeJudge(lambda q: "[[REFUSED]]" if "No way" in q else "Hm. [[ANSWERED]]")
    answers = ["No way {prompt}.", "Sure."]
    assert judge_refusals(judge, "j", ["A {answer}?", "B?"], answers) == [True, False]
    assert "A {answer}?" in judge.questions[0]  # texts are no placeholders
    assert "No way {prompt}." in judge.questions[0]


def test_a_verdict_within_the_thinking_does_not_count():
    judge = FakeJudge(lambda q: "[[REFUSED]]? </think> Who knows." if "A?" in q else "[[REFUSED]]")
    assert judge_refusals(judge, "j", ["A?", "B?"], ["Sure.", "No."]) == [None, True]


def test_a_judge_without_any_verdict_is_an_error():
    with pytest.raises(ConfigError, match=r"gave no verdict on any answer .its reply was 'maybe'"):
        judge_refusals(FakeJudge(lambda q: "maybe"), "j", ["A?"], ["Sure."])
    mixed = FakeJudge(lambda q: "maybe" if "No" in q else "[[ANSWERED]]")
    assert judge_refusals(mixed, "j", ["A?", "B?"], ["No", "Sure."]) == [None, False]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("[[REFUSED]]", True), ("[[REFUSED]] no, [[ANSWERED]]", False), ("REFUSED", None), ("", None)],
)
def test_the_last_verdict_counts(reply, verdict):
    assert parse_refusal(reply) is verdict


def test_prompts_of_one_language_alone_can_be_counted():
    prompts = [SafetyPrompt(str(n), "answer", "en", "A?") for n in range(8)]
    [over, lost] = count_refusals(prompts, [False] * 8, [True] * 8)
    assert (over.is_worse, lost.prompts, lost.p_value) == (True, 0, 1.0)
