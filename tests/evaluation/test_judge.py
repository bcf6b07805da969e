from itertools import combinations

import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judge import (
    INCONSISTENT,
    NO_VERDICT,
    WORST_BEAT_BEST,
    ModelJudge,
    check_verdicts,
    default_rubric,
    format_conversation,
    parse_verdict,
    read_rubric,
)

PROMPT = [{"role": "user", "content": "hi"}]
RUBRIC = "Q {prompt} A {first} B {second}"


def make_judge(reply, rubric=RUBRIC):
    """Return a judge whose reply is a function of the filled rubric."""

    def generate(conversations):
        return [reply(conversation[0]["content"]) for conversation in conversations]

    return ModelJudge("fake", generate, rubric)


def prefer_longer(text):
    first, second = text.split(" A ")[1].split(" B ")
    if len(first) == len(second):
        return "Alike. [[C]]"
    return "[[A]]" if len(first) > len(second) else "[[B]]"


def rank(reply, *answers):
    [ranking] = make_judge(reply).rank([PROMPT], [answers])
    return ranking


@pytest.mark.parametrize(
    ("text", "value"),
    [("[[A]]", 1.0), ("[[B]]", 0.0), ("x [[C]]", 0.5), ("[[A]] no: [[B]]", 0.0), ("A", None)],
)
def test_the_last_verdict_counts(text, value):
    assert parse_verdict(text) == value


def test_both_orders_are_judged_and_must_agree():
    prompts = []
    ranking = rank(lambda text: prompts.append(text) or prefer_longer(text), "long one", "short")
    assert prompts == ["Q hi A long one B short", "Q hi A short B long one"]
    assert (ranking.scores, ranking.warnings) == ((1.0, 0.0), ())
    assert ranking.judge_replies == ("[[A]]", "[[B]]")
    assert rank(prefer_longer, "short", "long one").outcome() == 0.0


@pytest.mark.parametrize("always", ["[[A]]", "[[B]]"])
def test_a_judge_that_prefers_a_position_gives_a_tie(always):
    ranking = rank(lambda text: always, "one", "other")
    assert (ranking.scores, ranking.warnings) == ((0.5, 0.5), (INCONSISTENT,))
    assert ranking.outcome() == 0.5


def test_a_verdict_in_only_one_order_does_not_count():
    ranking = rank(lambda text: "[[A]]" if "A one" in text else "[[C]]", "one", "other")
    assert ranking.warnings == (INCONSISTENT,)
    half = rank(lambda text: "[[A]]" if "A one" in text else "hm", "one", "other")
    assert (half.scores, half.warnings) == ((0.5, 0.5), (NO_VERDICT,))


def test_a_consistent_tie_is_a_tie_without_doubt():
    ranking = rank(prefer_longer, "one", "two")
    assert (ranking.is_tie, ranking.warnings) == (True, ())


def test_points_of_several_answers_are_wins_over_the_others():
    ranking = rank(prefer_longer, "bb", "dddd", "a", "ccc")
    assert ranking.scores == (1, 3, 0, 2)
    assert (ranking.best, ranking.worst) == (1, 2)
    assert len(ranking.judge_replies) == 2 * len(list(combinations(range(4), 2)))


def test_only_a_doubt_between_best_and_worst_counts():
    def undecided_about(*pair):
        return lambda text: "hm" if all(name in text for name in pair) else prefer_longer(text)

    assert rank(undecided_about("bb", "dddd"), "bb", "dddd", "a").warnings == ()
    assert rank(undecided_about(" a", "dddd"), "bb", "dddd", "a").warnings == (NO_VERDICT,)


def test_a_best_answer_that_lost_to_the_worst_is_a_doubt():
    """a beats b and c, b and c beat d, and d beats a: the best answer lost to the worst."""
    beats = {"ab", "ac", "bd", "cd", "da", "bc"}

    def reply(text):
        first, second = text.removeprefix("Q hi A ").split(" B ")
        return "[[A]]" if first + second in beats else "[[B]]"

    ranking = rank(reply, *"abcd")
    assert ranking.scores == (2, 2, 1, 1)
    assert (ranking.best, ranking.worst, ranking.warnings) == (0, 3, (WORST_BEAT_BEST,))
    assert rank(reply, *"badc").warnings == ()  # b is the first of the best answers, and beat c


def test_verdicts_within_the_thinking_do_not_count():
    def strip_thinking(conversation, reply):
        assert conversation == [{"role": "user", "content": conversation[0]["content"]}]
        return reply.rpartition("</t>")[2]

    def ranked(*replies):
        remaining = iter(replies)
        judge = ModelJudge(
            "m",
            lambda conversations: [next(remaining) for _ in conversations],
            RUBRIC,
            strip_thinking=strip_thinking,
        )
        [ranking] = judge.rank([PROMPT], [["one", "other"]])
        assert ranking.judge_replies == replies  # with the thinking
        return ranking

    ranking = ranked("[[B]] or [[A]]?</t>[[A]]", "[[A]]?</t>[[B]]")
    assert (ranking.scores, ranking.warnings) == ((1.0, 0.0), ())
    ranking = ranked("perhaps [[A]]</t>", "perhaps [[B]]</t>")
    assert ranking.warnings == (NO_VERDICT,)


def test_answers_of_different_prompts_are_not_mixed():
    rankings = make_judge(prefer_longer).rank(
        [PROMPT, PROMPT, PROMPT], [["aa", "b"], ["c"], ["d", "ee", "f"]]
    )
    assert [ranking.scores for ranking in rankings] == [(1, 0), (0,), (0.5, 2, 0.5)]


def test_placeholders_in_an_answer_are_not_filled():
    prompts = []
    make_judge(lambda text: prompts.append(text) or "[[C]]").rank(
        [PROMPT], [["{second}", "{prompt}"]]
    )
    assert prompts[0] == "Q hi A {second} B {prompt}"


def test_further_placeholders_have_a_value_for_each_prompt():
    prompts = []
    judge = make_judge(lambda text: prompts.append(text) or "[[C]]", RUBRIC + " by {principles}")
    other = [{"role": "user", "content": "{principles}"}]
    named = judge.with_values(lambda prompt: {"{principles}": f"<{prompt[0]['content']}>"})
    named.rank([PROMPT, other], [["a", "{principles}"], ["a", "b"]])
    assert prompts[::2] == [
        "Q hi A a B {principles} by <hi>",
        "Q {principles} A a B b by <{principles}>",
    ]
    judge.rank([PROMPT], [["a", "b"]])
    assert prompts[4] == "Q hi A a B b by {principles}"


def test_a_conversation_of_several_turns_is_formatted_with_roles():
    turns = [*PROMPT, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "?"}]
    assert format_conversation(PROMPT) == "hi"
    assert format_conversation(turns) == "user: hi\n\nassistant: ho\n\nuser: ?"


def test_the_rubric_is_part_of_the_provenance():
    assert make_judge(prefer_longer).provenance() == {"by": "judge fake", "rubric": RUBRIC}


def test_the_default_rubric_is_valid(tmp_path):
    path = tmp_path / "rubric.txt"
    path.write_text(default_rubric())
    assert read_rubric(path) == default_rubric()
    for verdict in ("[[A]]", "[[B]]", "[[C]]"):
        assert verdict in default_rubric()


def test_a_rubric_without_a_placeholder_is_rejected(tmp_path):
    path = tmp_path / "rubric.txt"
    path.write_text("{prompt} {first}")
    with pytest.raises(ConfigError, match=r"rubric.txt: the rubric has no \{second\}; add it"):
        read_rubric(path)
    with pytest.raises(ConfigError, match=r"none.txt: no such file"):
        read_rubric(tmp_path / "none.txt")


def test_a_judge_without_any_verdict_is_rejected_with_a_quotation():
    rankings = make_judge(lambda text: "I  cannot\nsay").rank([PROMPT, PROMPT], [["a", "b"]] * 2)
    with pytest.raises(
        ConfigError, match=r"fake: .* on any prompt \(its reply was 'I cannot say'\)"
    ):
        check_verdicts("fake", rankings)
    check_verdicts("fake", [*rankings, *make_judge(prefer_longer).rank([PROMPT], [["a", "b"]])])
