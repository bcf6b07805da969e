from itertools import combinations

import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judge import (
    CONTRARY,
    INCONSISTENT,
    NO_VERDICT,
    ModelJudge,
    check_verdicts,
    default_rubric,
    format_conversation,
    parse_verdict,
    read_rubric,
)

PROMPT = [{"role": "user", "content": "hi"}]
RUBRIC = "Q {prompt} A {first} B {second}"


def judge(say, rubric=RUBRIC):
    """A judge that is a function of the text it is given."""
    return ModelJudge("fake", lambda asked: [say(one[0]["content"]) for one in asked], rubric)


def longer(text):
    first, second = text.split(" A ")[1].split(" B ")
    if len(first) == len(second):
        return "Alike. [[C]]"
    return "[[A]]" if len(first) > len(second) else "[[B]]"


def rank(say, *answers):
    [ranking] = judge(say).rank([PROMPT], [answers])
    return ranking


@pytest.mark.parametrize(
    ("text", "value"),
    [("[[A]]", 1.0), ("[[B]]", 0.0), ("x [[C]]", 0.5), ("[[A]] no: [[B]]", 0.0), ("A", None)],
)
def test_the_last_verdict_counts(text, value):
    assert parse_verdict(text) == value


def test_both_orders_are_asked_and_what_they_agree_on_is_believed():
    asked = []
    ranking = rank(lambda text: asked.append(text) or longer(text), "long one", "short")
    assert asked == ["Q hi A long one B short", "Q hi A short B long one"]
    assert (ranking.points, ranking.doubts) == ((1.0, 0.0), ())
    assert ranking.said == ("[[A]]", "[[B]]")
    assert rank(longer, "short", "long one").outcome() == 0.0


@pytest.mark.parametrize("always", ["[[A]]", "[[B]]"])
def test_a_judge_that_follows_the_place_decides_nothing(always):
    ranking = rank(lambda text: always, "one", "other")
    assert (ranking.points, ranking.doubts) == ((0.5, 0.5), (INCONSISTENT,))
    assert ranking.outcome() == 0.5


def test_half_a_verdict_is_none():
    ranking = rank(lambda text: "[[A]]" if "A one" in text else "[[C]]", "one", "other")
    assert ranking.doubts == (INCONSISTENT,)
    mute = rank(lambda text: "[[A]]" if "A one" in text else "hm", "one", "other")
    assert (mute.points, mute.doubts) == ((0.5, 0.5), (NO_VERDICT,))


def test_an_agreed_tie_is_a_tie_and_no_doubt():
    ranking = rank(longer, "one", "two")
    assert (ranking.is_tie, ranking.doubts) == (True, ())


def test_of_several_answers_points_are_wins_over_the_others():
    ranking = rank(longer, "bb", "dddd", "a", "ccc")
    assert ranking.points == (1, 3, 0, 2)
    assert (ranking.best, ranking.worst) == (1, 2)
    assert len(ranking.said) == 2 * len(list(combinations(range(4), 2)))


def test_only_a_doubt_between_best_and_worst_counts():
    def shy(*pair):
        return lambda text: "hm" if all(name in text for name in pair) else longer(text)

    assert rank(shy("bb", "dddd"), "bb", "dddd", "a").doubts == ()
    assert rank(shy(" a", "dddd"), "bb", "dddd", "a").doubts == (NO_VERDICT,)


def test_a_best_answer_that_lost_to_the_worst_makes_no_pair():
    """a beats b and c, b and c beat d, and d beats a: whoever has most points is not believed."""
    beats = {"ab", "ac", "bd", "cd", "da", "bc"}

    def say(text):
        first, second = text.removeprefix("Q hi A ").split(" B ")
        return "[[A]]" if first + second in beats else "[[B]]"

    ranking = rank(say, *"abcd")
    assert ranking.points == (2, 2, 1, 1)
    assert (ranking.best, ranking.worst, ranking.doubts) == (0, 3, (CONTRARY,))
    assert rank(say, *"badc").doubts == ()  # b is the first of the best here, and beat c


def test_verdicts_within_a_thought_are_none():
    def thoughtless(asked, text):
        assert asked == [{"role": "user", "content": asked[0]["content"]}]
        return text.rpartition("</t>")[2]

    def ranked(*said):
        words = iter(said)
        ask = ModelJudge(
            "m", lambda asked: [next(words) for _ in asked], RUBRIC, answered=thoughtless
        )
        [ranking] = ask.rank([PROMPT], [["one", "other"]])
        assert ranking.said == said  # all of its words are kept
        return ranking

    found = ranked("[[B]] or [[A]]?</t>[[A]]", "[[A]]?</t>[[B]]")
    assert (found.points, found.doubts) == ((1.0, 0.0), ())
    found = ranked("perhaps [[A]]</t>", "perhaps [[B]]</t>")
    assert found.doubts == (NO_VERDICT,)


def test_prompts_keep_their_answers_apart():
    rankings = judge(longer).rank([PROMPT, PROMPT, PROMPT], [["aa", "b"], ["c"], ["d", "ee", "f"]])
    assert [ranking.points for ranking in rankings] == [(1, 0), (0,), (0.5, 2, 0.5)]


def test_an_answer_cannot_write_itself_into_the_rubric():
    seen = []
    judge(lambda text: seen.append(text) or "[[C]]").rank([PROMPT], [["{second}", "{prompt}"]])
    assert seen[0] == "Q hi A {second} B {prompt}"


def test_a_conversation_is_shown_with_its_roles():
    turns = [*PROMPT, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "?"}]
    assert format_conversation(PROMPT) == "hi"
    assert format_conversation(turns) == "user: hi\n\nassistant: ho\n\nuser: ?"


def test_what_the_judge_was_told_is_among_its_facts():
    assert judge(longer).facts() == {"by": "judge fake", "rubric": RUBRIC}


def test_the_rubric_that_ships_is_one(tmp_path):
    path = tmp_path / "rubric.txt"
    path.write_text(default_rubric())
    assert read_rubric(path) == default_rubric()
    for mark in ("[[A]]", "[[B]]", "[[C]]"):
        assert mark in default_rubric()


def test_a_rubric_without_a_place_for_an_answer_is_refused(tmp_path):
    path = tmp_path / "rubric.txt"
    path.write_text("{prompt} {first}")
    with pytest.raises(ConfigError, match=r"rubric.txt: the rubric has no \{second\}; add it"):
        read_rubric(path)
    with pytest.raises(ConfigError, match=r"none.txt: cannot be read \(No such file"):
        read_rubric(tmp_path / "none.txt")


def test_a_judge_without_any_verdict_is_refused_with_its_words():
    rankings = judge(lambda text: "I  cannot\nsay").rank([PROMPT, PROMPT], [["a", "b"]] * 2)
    with pytest.raises(ConfigError, match=r"fake: .* on any prompt \(it said 'I cannot say'\)"):
        check_verdicts("fake", rankings)
    check_verdicts("fake", [*rankings, *judge(longer).rank([PROMPT], [["a", "b"]])])
