"""Judgements of served answers: rows, replacement, bounds and refusals."""

import json

import pytest

from mlx_dpo.chat.feedback import JsonlFile
from mlx_dpo.chat.requests import FEEDBACK, RequestError, parse_request
from mlx_dpo.chat.served_feedback import RecentAnswers, ServedAnswer, ServedFeedback

PROMPT = ({"role": "user", "content": "Why?"},)
SOURCE = {"aligned": {"model": "m", "side": "aligned"}, "base": {"model": "m", "side": "base"}}


def answer(text="Because.", **fields):
    return ServedAnswer(PROMPT, text, "aligned", {"temperature": 0.7}, **fields)


@pytest.fixture
def feedback(tmp_path):
    store = ServedFeedback(JsonlFile(tmp_path / "judged.jsonl"), SOURCE)
    for id in ("one", "two"):
        store.answers.add(id, answer(f"Because {id}."))
    return store


def rows(store):
    return [json.loads(line) for line in store.file.path.read_text().splitlines()]


def shown(store):
    return [(row["completion"][0]["content"], row["label"]) for row in rows(store)]


def test_a_good_answer_is_a_row_as_chat_writes_it(feedback):
    reply = feedback.write({"id": "one", "rating": "good", "comment": "clear"})
    assert reply == {"object": "feedback", "id": "one", "rating": "good", "replaced": False}
    [row] = rows(feedback)
    provenance = row.pop("provenance")
    assert row == {
        "prompt": list(PROMPT),
        "completion": [{"role": "assistant", "content": "Because one."}],
        "label": True,
    }
    del provenance["time"]
    assert provenance == {
        "by": "mlx-dpo serve", "judge": "person", "id": "one", "comment": "clear", "model": "m",
        "side": "aligned", "sampling": {"temperature": 0.7},
    }  # fmt: skip


def test_the_second_judgement_of_an_answer_replaces_the_first(feedback):
    feedback.write({"id": "one", "rating": "good"})
    feedback.write({"id": "two", "rating": "good"})
    assert feedback.write({"id": "one", "rating": "bad"})["replaced"] is True
    assert shown(feedback) == [("Because two.", True), ("Because one.", False)]
    # An edit is two rows, and a rating after it removes both.
    assert feedback.write({"id": "one", "edited": "So."})["rating"] == "edited"
    assert shown(feedback) == [
        ("Because two.", True), ("Because one.", False), ("So.", True),
    ]  # fmt: skip
    assert rows(feedback)[-1]["provenance"]["author"] == "person"
    assert "model" not in rows(feedback)[-1]["provenance"]
    feedback.write({"id": "one", "rating": "good"})
    assert shown(feedback) == [("Because two.", True), ("Because one.", True)]


def test_the_same_text_in_two_completions_has_one_label(feedback):
    """A greedy model answers a repeated question with the same text."""
    feedback.answers.add("again", answer("Because one."))
    feedback.write({"id": "one", "rating": "good"})
    assert feedback.write({"id": "again", "rating": "bad"})["replaced"] is True
    assert shown(feedback) == [("Because one.", False)]


def test_rows_of_other_programs_stay(feedback):
    row = {"prompt": list(PROMPT), "label": True, "provenance": {"by": "mlx-dpo chat"},
           "completion": [{"role": "assistant", "content": "Because one."}]}  # fmt: skip
    feedback.file.append(row)
    feedback.write({"id": "one", "rating": "bad"})
    assert [r["provenance"]["by"] for r in rows(feedback)] == ["mlx-dpo chat", "mlx-dpo serve"]


def test_tools_of_the_request_and_a_cut_are_stored(feedback):
    tools = [{"type": "function", "function": {"name": "f"}}]
    feedback.answers.add("cut", answer(request={"tools": tools}, is_cut=True))
    feedback.write({"id": "cut", "rating": "bad"})
    [row] = rows(feedback)
    assert row["tools"] == tools
    assert row["provenance"]["cut"] is True


@pytest.mark.parametrize(
    ("judgement", "status", "found"),
    [
        ({"id": "none", "rating": "good"}, 404, "no such answer"),
        ({"id": "one", "edited": " Because one. "}, 400, "the same text"),
        ({"id": "tool", "rating": "good"}, 400, "calls a tool"),
        ({"id": "empty", "rating": "bad"}, 400, "is empty"),
    ],
)
def test_a_judgement_that_teaches_nothing_is_refused(feedback, judgement, status, found):
    feedback.answers.add("tool", answer(calls_tools=True))
    feedback.answers.add("empty", answer(" "))
    with pytest.raises(RequestError, match=found) as caught:
        feedback.write(judgement)
    assert caught.value.status == status
    assert not feedback.file.path.exists()


def test_the_oldest_answers_are_forgotten_beyond_the_bounds():
    answers = RecentAnswers(max_answers=3, max_characters=10_000)
    for number in range(5):
        answers.add(str(number), answer(str(number)))
    assert [answers.get(str(n)) is not None for n in range(5)] == [False, False, True, True, True]
    size = answer("").characters
    answers = RecentAnswers(max_answers=9, max_characters=2 * size + 10)
    for id, text in (("a", "x" * 5), ("b", "x" * 5), ("c", "")):
        answers.add(id, answer(text))
    assert [answers.get(id) is not None for id in "abc"] == [False, True, True]
    answers.add("huge", answer("x" * 10_000))  # alone beyond the bound
    assert [answers.get(id) for id in ("b", "c", "huge")] == [None, None, None]


@pytest.mark.parametrize(
    ("body", "param", "found"),
    [
        ({"rating": "good"}, "id", "`id` is missing"),
        ({"id": 3, "rating": "good"}, "id", "must be a string"),
        ({"id": "x" * 201, "rating": "good"}, "id", "at most 200 characters"),
        ({"id": "one"}, "rating", "`rating` is missing"),
        ({"id": "one", "rating": None}, "rating", "`rating` is missing"),
        ({"id": "one", "rating": "great"}, "rating", "must be good or bad, found 'great'"),
        ({"id": "one", "rating": True}, "rating", "must be good or bad, found True"),
        ({"id": "one", "rating": "good", "edited": "x"}, "rating", "no effect with `edited`"),
        ({"id": "one", "edited": " "}, "edited", "is empty"),
        ({"id": "one", "rating": "good", "comment": "x" * 10_001}, "comment", "10,000 characters"),
        ({"id": "one", "rating": "good", "comment": "\ud83d"}, "comment", "unpaired surrogate"),
        ({"id": "one", "rating": "good", "coment": "x"}, "coment", "did you mean `comment`"),
        ({"id": "one", "rating": "good", "seed": 1}, "seed", "is not a field of /v1/feedback"),
    ],
)
def test_every_field_is_checked(body, param, found):
    with pytest.raises(RequestError, match=found) as caught:
        parse_request(body, FEEDBACK, vocab_size=300)
    assert caught.value.param == param


def test_the_fields_of_feedback_are_none_of_a_completion():
    body = {"prompt": "x", "rating": "good"}
    with pytest.raises(RequestError, match="`rating` is not a field of /v1/completions"):
        parse_request(body, "/v1/completions", vocab_size=300)
