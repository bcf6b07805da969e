"""Exports of annotation tools: the pairs are those that a reader of the export would write."""

import json
import random
import re
from copy import deepcopy
from pathlib import Path

import pytest

from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import read_rows
from mlx_dpo.errors import (
    EMPTY_COMPLETION,
    NOT_TEXT,
    TIED,
    UNJUDGED,
    UNPAIRED,
    BadPairError,
    DataError,
)
from mlx_dpo.schemas import find_schema, parse_row
from mlx_dpo.schemas.schema import DEFAULT_RULES, Row, RowRules, rename_columns
from mlx_dpo.types import PreferenceExample
from tests.trained_run import train

EXAMPLES = Path(__file__).parents[1] / "data" / "examples"
LABELS = RowRules(judged=True)
GIFT = ("Thank a friend for a gift.", "Thank you, I love the scarf!", "Thanks.")
BUSY = ("Say no to an invitation.", "Sadly I am busy on Friday.", "No.")
SEA = ("How do I get to the sea?", "Take the morning train; it is cheap.", "Go there.")
FAR = ("Is it far?", "Not far: two hours.", "Far.")


def last(text):
    return text if isinstance(text, str) else text[-1]["content"]


def shown(example):
    """Return what a person would compare: the last turn of the prompt, and the answers."""
    if isinstance(example, BadPairError):
        return example.reason
    if isinstance(example, PreferenceExample):
        return last(example.prompt), last(example.chosen), last(example.rejected)
    return last(example.prompt), last(example.completion), example.desirable


def parsed(row, rules=DEFAULT_RULES):
    row = row if isinstance(row, Row) else Row(row, "rows[0]")
    return [shown(example) for example in parse_row(row, rules)]


def read(name, rules=DEFAULT_RULES):
    report = PairsReport("rows", 0)
    found = [shown(e.example) for e in parse_rows(read_rows(EXAMPLES / name), rules, report)]
    return found, {reason: len(places) for reason, places in report.dropped.items()}


def load(name):
    return json.loads((EXAMPLES / name).read_text())


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("open-webui.json", [SEA, ("Name one.", "Geirangerfjord, in Norway.", "No."), FAR]),
        ("open-webui-chats.json", [SEA, FAR]),
        ("argilla.json", [GIFT, BUSY, ("Wish somebody luck.", "Best of luck tomorrow!",
                                       "You will need it.")]),
        ("argilla-flat.jsonl", [GIFT, BUSY]),
        ("label-studio.json", [
            ("Where is the key?", "Under the mat, by the door.", "Look."),
            ("When does it open?", "At nine, every day but Sunday.", "Later."),
            ("Who wrote it?", "Astrid Lindgren, in 1945.", "Somebody."),
        ]),
        ("label-studio-min.json", [
            ("Where is the key?", "Under the mat, by the door.", "Look."),
            ("When does it open?", "At nine, every day but Sunday.", "Later."),
            ("Who wrote it?", "Astrid Lindgren, in 1945.", "Somebody."),
        ]),
    ],
)  # fmt: skip
def test_an_export_gives_these_pairs_and_no_others(name, pairs):
    assert read(name) == (pairs, {})


@pytest.mark.parametrize(
    ("name", "count", "settings"),
    [
        ("open-webui.json", 3, {}),
        ("open-webui.json", 3, {"loss_type": ["kto"]}),
        ("open-webui-chats.json", 2, {"pair_labelled": True}),
        ("labels/anything-llm.json", 3, {"loss_type": ["kto"]}),
        ("argilla.json", 3, {}),
        ("argilla-flat.jsonl", 2, {}),
        ("label-studio.json", 3, {}),
        ("label-studio-min.json", 3, {}),
    ],
)
def test_a_step_trains_on_every_export(trained, tmp_path, name, count, settings):
    """One epoch is one step of all the pairs."""
    train(
        trained,
        **{"pairs": [str(EXAMPLES / name)], "output": str(tmp_path / "run"), "epochs": 1,
           "batch_size": count, "valid_fraction": 0.0} | settings,
    )  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [row["step"] for row in steps if "loss" in row] == [1]


def test_thumbs_are_labelled_answers_for_kto():
    found, dropped = read("open-webui.json", LABELS)
    assert found == [
        (SEA[0], SEA[1], True), ("Name one.", "No.", False), (FAR[0], FAR[1], True),
    ]  # fmt: skip
    assert not dropped


def test_pair_labelled_pairs_thumbs_of_one_prompt_across_feedbacks():
    """Two feedbacks about one chat: the good and the bad answer make one pair, not two."""
    good = load("open-webui.json")[2]
    bad = json.loads(json.dumps(good))
    bad["meta"]["message_id"], bad["data"]["rating"] = "a2", -1
    report = PairsReport("rows", 0)
    rows = [Row(record, f"rows[{i}]") for i, record in enumerate([good, bad])]
    found = [shown(e.example) for e in parse_rows(rows, RowRules(pair_labelled=True), report)]
    assert found == [FAR]
    # Without the setting, the pair is made at the good answer, and the bad one is counted.
    report = PairsReport("rows", 0)
    assert [shown(e.example) for e in parse_rows(rows, RowRules(), report)] == [FAR]
    assert report.dropped == {UNPAIRED: ["rows[1]"]}


def messages_of(row):
    return row["snapshot"]["chat"]["chat"]["history"]["messages"]


def feedback(**changes):
    """Return the first feedback of the example with other values for its message `a1`."""
    row = load("open-webui.json")[0]
    messages_of(row)["a1"] |= changes
    return row


def with_rating(rating):
    row = feedback()
    row["data"]["rating"] = rating
    return row


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (with_rating(-1), [(SEA[0], "Go there.", SEA[1])]),
        (with_rating("1"), [SEA]),
        (with_rating(0), [TIED]),
        (with_rating(None), [UNJUDGED]),
        (with_rating(True), [UNJUDGED]),
        (feedback(content=""), [EMPTY_COMPLETION]),
        (feedback(files=[{"type": "image", "url": "x"}]), [NOT_TEXT]),
        (feedback(content='<details type="tool_calls" done="true">\nx\n</details>\nSo.'),
         [NOT_TEXT]),
    ],
)  # fmt: skip
def test_a_feedback_with_another_rating_or_answer(row, expected):
    assert parsed(row) == expected


def test_messages_in_a_circle_are_an_error():
    row = feedback(parentId="a2")
    messages_of(row)["a2"]["parentId"] = "a1"
    with pytest.raises(DataError, match="leads in a circle"):
        parsed(row, LABELS)


def test_thumbs_of_anything_llm_are_labels_and_pairs_only_by_prompt():
    labels = [
        ("Where is the key?", "Under the mat, by the door.", True),
        ("Where is the key?", "Look.", False),
        ("When does it open?", "At nine.", True),
    ]
    assert read("labels/anything-llm.json", LABELS) == (labels, {UNJUDGED: 1})
    assert read("labels/anything-llm.json", RowRules(pair_labelled=True)) == (
        [("Where is the key?", "Under the mat, by the door.", "Look.")], {UNJUDGED: 1, UNPAIRED: 1}
    )  # fmt: skip
    assert read("labels/anything-llm.json") == ([], {UNPAIRED: 3, UNJUDGED: 1})
    row = load("labels/anything-llm.json")[0] | {"attachments": [{"type": "image", "image": "x"}]}
    assert parsed(row, LABELS) == [NOT_TEXT]


def test_a_thumb_without_another_answer_makes_no_pair_but_a_label():
    row = feedback()
    del messages_of(row)["a2"]
    assert parsed(row) == [UNPAIRED]
    assert parsed(row, LABELS) == [(SEA[0], SEA[1], True)]


def test_two_answers_with_the_same_thumb_tie():
    row = feedback()
    messages_of(row)["a2"]["annotation"] = {"rating": 1}
    assert parsed(row) == [TIED]


def test_an_arena_win_beats_every_other_answer():
    row = feedback()
    messages_of(row)["a3"] = messages_of(row)["a2"] | {"id": "a3", "content": "By bus."}
    messages_of(row)["q1"]["childrenIds"].append("a3")
    assert parsed(row) == [SEA, (SEA[0], SEA[1], "By bus.")]


def test_in_a_chat_outside_the_arena_an_unrated_answer_is_not_worse():
    """It may have been made after the rating."""
    row = load("open-webui-chats.json")[1]
    del row["chat"]["history"]["messages"]["a2"]["annotation"]
    assert parsed(row) == [UNPAIRED]


def test_a_chat_without_ratings_is_counted():
    row = load("open-webui-chats.json")[1]
    for message in row["chat"]["history"]["messages"].values():
        message.pop("annotation", None)
    assert parsed(row) == [UNJUDGED]


def test_a_feedback_without_its_chat_says_where_to_export():
    row = feedback()
    row["snapshot"] = None
    with pytest.raises(DataError, match="export it in Open WebUI"):
        parsed(row)


def record(responses, **fields):
    row = load("argilla.json")[0]
    return row | {"fields": row["fields"] | fields, "responses": responses}


def values(*given):
    return [{"value": value, "user_id": str(i)} for i, value in enumerate(given)]


ONE_TWO, TWO_ONE = ["response1", "response2"], ["response2", "response1"]


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        ({"q": values(ONE_TWO, TWO_ONE, TWO_ONE)}, [GIFT]),
        ({"q": values(ONE_TWO, TWO_ONE)}, [TIED]),
        ({"q": values([{"value": "response1", "rank": 2}, {"value": "response2", "rank": 1}])},
         [GIFT]),
        ({"q": values([{"value": "response1", "rank": 1}, {"value": "response2", "rank": 1}])},
         [TIED]),
        ({"q": values("Response 2", "response 2", "tie")}, [GIFT]),
        ({"q": values("Response 1", "response 2", "tie")}, [TIED]),
        ({"q": values("tie", "response 2", "tie")}, [TIED]),
        ({"response1-rating": values(1, 5), "response2-rating": values(4)}, [GIFT]),
        ({"response1-rating": values(4), "response2-rating": values(4)}, [TIED]),
        ({"q": [{"value": TWO_ONE, "user_id": "1", "status": "submitted"},
                {"value": ONE_TWO, "user_id": "2", "status": "discarded"},
                {"value": ONE_TWO, "user_id": "3", "status": "draft"}]}, [GIFT]),
        ({"q": [{"value": ONE_TWO, "user_id": "2", "status": "discarded"}]}, [UNJUDGED]),
        ({}, [UNJUDGED]),
        ({"q": values("helpful")}, "no question says which answer is better"),
        ({"q": values(ONE_TWO), "r": values(TWO_ONE)}, "several questions"),
    ],
)  # fmt: skip
def test_the_judgement_of_argilla_s_annotators(responses, expected):
    if isinstance(expected, str):
        with pytest.raises(DataError, match=re.escape(expected)):
            parsed(record(responses))
    else:
        assert parsed(record(responses)) == expected


def test_column_names_the_question_and_the_prompt_of_a_record():
    """The other question says the opposite, and the prompt has a name of its own."""
    row = record({"tone": values(TWO_ONE), "length": values(ONE_TWO)}, task="Say thanks.")
    del row["fields"]["instruction"]
    with pytest.raises(DataError, match=r"--column prompt=fields\.NAME"):
        parsed(row)
    columns = {"prompt": "fields.task", "preference": "responses.tone"}
    assert parsed(rename_columns(Row(row, "rows[0]"), columns)) == [("Say thanks.", *GIFT[1:])]
    flat = json.loads((EXAMPLES / "argilla-flat.jsonl").read_text().splitlines()[0])
    flat |= {f"length{name.removeprefix('preference')}": value
             for name, value in flat.items() if name.startswith("preference")}  # fmt: skip
    with pytest.raises(DataError, match=r"--column preference=NAME\.responses"):
        parsed(flat)
    columns = {"preference": "preference.responses"}
    renamed = rename_columns(Row(flat, "rows[0]"), columns)
    assert parsed(renamed, RowRules(renamed=columns)) == [GIFT]


def test_ranked_makes_all_pairs_of_rated_answers():
    row = load("argilla.json")[2]
    found = parsed(row, RowRules(ranked="all"))
    assert [pair[1:] for pair in found] == [
        ("Best of luck tomorrow!", "Luck."), ("Best of luck tomorrow!", "You will need it."),
        ("Luck.", "You will need it."),
    ]  # fmt: skip


def task(*verdicts, data=None, kind="pairwise", to="answer1,answer2"):
    row = load("label-studio.json")[0]
    entry = "selected" if kind == "pairwise" else "choices"
    row["annotations"] = [
        {"completed_by": i, "was_cancelled": False,
         "result": [{"type": kind, "from_name": "q", "to_name": to,
                     "value": {entry: v if kind == "pairwise" else [v]}}]}
        for i, v in enumerate(verdicts)
    ]  # fmt: skip
    return row | ({"data": data} if data else {})


KEY = ("Where is the key?", "Under the mat, by the door.", "Look.")
SWAPPED = (KEY[0], KEY[2], KEY[1])
OWN = {"prompt": KEY[0], "pairText1": KEY[1], "pairText2": KEY[2]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (task("left", "right", "left"), [KEY]),
        (task("left", "right"), [TIED]),
        (task(), [UNJUDGED]),
        (task("left", to="answer2,answer1"), [SWAPPED]),
        (task("right", data=OWN, to="text1,text2"), [SWAPPED]),
        (task("Right", kind="choices", to="prompt"), [SWAPPED]),
        (task("Both bad", kind="choices", to="prompt"), [TIED]),
        (task("answer1", kind="choices", to="prompt"), [KEY]),
        (task("neither here nor there", kind="choices"), "does not say which answer is better"),
        (task("left", data=OWN | {"note": "x"}, to="text1,text2"), "--column left=data.NAME"),
        (task("left", data={"answer1": "a", "answer2": "b"}), "--column prompt=data.NAME"),
    ],
)
def test_the_judgement_of_label_studio_s_annotators(row, expected):
    if isinstance(expected, str):
        with pytest.raises(DataError, match=re.escape(expected)):
            parsed(row)
    else:
        assert parsed(row) == expected


def test_a_cancelled_annotation_does_not_count():
    row = task("left", "right", "right")
    for annotation in row["annotations"][1:]:
        annotation["was_cancelled"] = True
    assert parsed(row) == [KEY]


def test_column_names_the_two_answers_of_a_task():
    row = task("left", data=OWN | {"note": "x"}, to="text1,text2")
    columns = {"left": "data.pairText2", "right": "data.pairText1"}
    assert parsed(rename_columns(Row(row, "rows[0]"), columns)) == [SWAPPED]


def test_two_questions_of_one_annotation_are_not_mixed_up():
    row = task("left")
    result = row["annotations"][0]["result"]
    result.append(result[0] | {"from_name": "other", "value": {"selected": "right"}})
    with pytest.raises(DataError, match="several questions"):
        parsed(row)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]},
        {"fields": "x", "prompt": "p", "chosen": "a", "rejected": "b"},
        {"data": "x", "annotations": [], "prompt": "p", "chosen": "a", "rejected": "b"},
        {"chat": "x", "prompt": "p", "chosen": "a", "rejected": "b"},
        {"chat": {"messages": []}, "prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2], "workspace": "w"},
        {"prompt": "p", "response_a": "a", "response_b": "b", "preference": "a", "annotator": 3},
    ],
)
def test_rows_of_other_schemas_are_not_taken_for_exports(record):
    assert find_schema(Row(record, "rows[0]")).name not in (
        "open-webui", "anything-llm", "argilla", "label-studio",
    )  # fmt: skip


JUNK = (
    None, True, 0, -1, 1.5, float("nan"), "", "x", "left", "tie", "1", [], [1], ["a"], [[]], [{}],
    {}, {"a": 1}, {"role": "user"}, {"value": None}, [{"selected": 1}],
)  # fmt: skip


def places_of(value, place=()):
    """Yield the path of keys to every value inside of a JSON value, and to itself."""
    yield place
    entries = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for key, inner in entries:
        yield from places_of(inner, (*place, key))


def damaged(row, rng):
    """Return a copy of a row with one to three values removed or replaced."""
    copy = deepcopy(row)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *way, last = rng.choice([place for place in places_of(copy) if place])
        node = copy
        for key in way:
            node = node[key]
        if isinstance(node, dict) and rng.random() < 0.3 and len(copy) > 1:
            del node[last]
        else:
            node[last] = deepcopy(rng.choice(JUNK))
    return copy


@pytest.mark.parametrize("name", sorted(
    str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.json")
))  # fmt: skip
def test_a_damaged_export_gives_examples_or_one_line_and_never_a_traceback(name):
    rng, rows = random.Random(name), load(name)
    for _ in range(300):
        row = Row(damaged(rng.choice(rows), rng), "rows[0]")
        for rules in (DEFAULT_RULES, LABELS, RowRules(ranked="all")):
            try:
                assert parse_row(row, rules, find_schema(row, rules))
            except DataError as error:
                assert "\n" not in str(error)
