"""Rows -> what they say: ranked lists, labelled rows, columns, margins, and what is lost."""

import json

import pytest
from byte_tokenizer import EOS

from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.load import check_settings_used, load_pairs
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.errors import (
    EMPTY_COMPLETION,
    NOT_TEXT,
    TIED,
    UNPAIRED,
    BadPairError,
    ConfigError,
    DataError,
)
from mlx_dpo.schemas import find_schema, parse_pairs, parse_row
from mlx_dpo.schemas.schema import Row, RowRules, rename_columns

TOKENS = TokenRules(vocab_size=262)


def ranked(scores, how=None, /, **more):
    texts = [f"answer {i}" for i in range(len(scores))]
    record = {"prompt": "q", "completions": texts, "scores": scores} | more
    return parse_row(Row(record, "rows:1"), RowRules(ranked=how))


def pairs(found):
    return [
        (int(one.chosen[-1]), int(one.rejected[-1]))
        for one in found
        if not isinstance(one, BadPairError)
    ]


def ties(found):
    return [one.reason for one in found if isinstance(one, BadPairError)]


@pytest.mark.parametrize(
    ("how", "scores", "expected", "tied"),
    [
        (None, [1, 5, 3], [(1, 0)], 0),
        ("best_worst", [1, 5, 3], [(1, 0)], 0),
        ("adjacent", [1, 5, 3], [(1, 2), (2, 0)], 0),
        ("all", [1, 5, 3], [(1, 2), (1, 0), (2, 0)], 0),
        ("best_worst", [2, 2], [], 1),
        ("all", [5, 5, 3], [(0, 2), (1, 2)], 1),
        ("adjacent", [5, 5, 3], [(1, 2)], 1),
        ("all", [-1.5, -1.5, -1.5], [], 3),
    ],
)
def test_a_ranked_list_makes_the_pairs_that_are_asked_for(how, scores, expected, tied):
    found = ranked(scores, how)
    assert pairs(found) == expected
    assert ties(found) == [TIED] * tied


def test_a_lower_rank_is_better_and_scores_may_stand_in_the_completions():
    assert pairs(ranked([2, 1, 3], scores=None, ranks=[2, 1, 3])) == [(1, 2)]
    items = [{"response": f"answer {i}", "overall_score": s} for i, s in enumerate([3, 9, 1])]
    assert pairs(ranked([], completions=items)) == [(1, 2)]
    items = [{"text": f"answer {i}", "rank": s} for i, s in enumerate([3, 9, 1])]
    assert pairs(ranked([], completions=items)) == [(2, 1)]


def test_ties_are_counted_and_never_an_error(write, plain):
    rows = [
        {"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]},
        {"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 1, 0]},
    ]
    found = load_pairs(write(*rows), plain, TOKENS, rows=RowRules(ranked="all"))
    assert [pair.location for pair in found.pairs] == ["pairs.jsonl:2"] * 2
    assert found.report.dropped == {TIED: ["pairs.jsonl:1", "pairs.jsonl:2"]}


def test_a_fault_of_one_pair_of_a_list_leaves_the_others(write, plain):
    row = {"prompt": "q", "completions": ["a", " ", "c"], "scores": [3, 2, 1]}
    with pytest.raises(BadPairError, match=EMPTY_COMPLETION):
        load_pairs(write(row), plain, TOKENS, rows=RowRules(ranked="all"))
    found = load_pairs(write(row), plain, TOKENS, rows=RowRules(ranked="all"), bad_pairs="drop")
    assert [pair.chosen for pair in found.pairs] == [(*b"a", EOS)]
    assert found.report.dropped == {EMPTY_COMPLETION: ["pairs.jsonl:1"] * 2}


def test_the_scores_that_ranked_a_pair_may_be_its_margin(write, plain):
    row = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, 2.5, 1]}
    [pair] = load_pairs(write(row), plain, TOKENS, rows=RowRules(margin="score")).pairs
    assert pair.margin == 2


@pytest.mark.parametrize(
    "names",
    [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
     ("chosen-score", "rejected-score"), ("score-chosen", "score-rejected")],
)  # fmt: skip
def test_ratings_of_both_sides_make_a_margin(write, plain, names):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"} | dict(zip(names, [4, 1.5], strict=True))
    found = load_pairs(write(row), plain, TOKENS, rows=RowRules(margin="score"))
    assert found.pairs[0].margin == 2.5
    assert not found.report.unused_fields
    with pytest.raises(DataError, match="`rating` must be a number"):
        load_pairs(write(row), plain, TOKENS, rows=RowRules(margin="rating"))


def labelled(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_good_answers_meet_bad_ones_of_the_same_prompt_only_where_that_is_asked(write, plain):
    rows = [
        labelled("q", "good", True), labelled("q", "bad", False), labelled("r", "good", True),
        {"prompt": "s", "chosen": "x", "rejected": "y"}, labelled("q", "worse", False),
        labelled("q", "better", "true"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="--pair-labelled"):
        load_pairs(write(*rows), plain, TOKENS)
    found = load_pairs(write(*rows), plain, TOKENS, rows=RowRules(pair_labelled=True))
    assert [(bytes(p.chosen[:-1]), bytes(p.rejected[:-1])) for p in found.pairs] == [
        (b"x", b"y"), (b"good", b"bad"), (b"better", b"worse"),
    ]  # fmt: skip
    assert found.pairs[1].location == "pairs.jsonl:1 and pairs.jsonl:2"
    assert found.report.dropped == {UNPAIRED: ["pairs.jsonl:3"]}


def test_rules_that_did_nothing_are_refused(write, plain):
    path = write({"prompt": "q", "chosen": "a", "rejected": "b"})
    for rules, name in (
        (RowRules(ranked="all"), "ranked"), (RowRules(pair_labelled=True), "pair_labelled")
    ):  # fmt: skip
        report = load_pairs(path, plain, TOKENS, rows=rules).report
        with pytest.raises(ConfigError, match=f"`{name}` has no effect"):
            check_settings_used(TOKENS, rules, [report])


def test_columns_are_renamed_before_a_row_is_recognised():
    record = {"q": {"text": "hi"}, "good": "yo", "rejected": "no"}
    names = {"prompt": "q.text", "chosen": "good"}
    [found] = parse_pairs(rename_columns(Row(record, "rows:1"), names))
    assert (found.prompt, found.chosen, found.rejected) == ("hi", "yo", "no")
    assert rename_columns(Row(record, "rows:1"), names).record == {
        "q": {"text": "hi"}, "rejected": "no", "prompt": "hi", "chosen": "yo",
    }  # fmt: skip
    assert rename_columns(Row({"a.b": 1}, ""), {"c": "a.b"}).record == {"c": 1}


@pytest.mark.parametrize("column", ["question", "q.answer", "good.text"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(column):
    row = Row({"q": {"text": "hi"}, "good": "yo"}, "rows:1")
    with pytest.raises(DataError) as error:
        rename_columns(row, {"prompt": column})
    assert str(error.value) == f"rows:1: no column `{column}` (found `good`, `q`)"


def test_a_name_that_no_row_is_read_by_is_refused(write, plain):
    path = write({"prompt": "q", "chosen": "a", "rejected": "b", "x": 1})
    with pytest.raises(ConfigError, match="`column` promt=x has no effect; rows written as string"):
        load_pairs(path, plain, TOKENS, rows=RowRules(renamed={"promt": "x"}))
    found = load_pairs(path, plain, TOKENS, rows=RowRules(renamed={"n": "x"}, margin="n"))
    assert found.pairs[0].margin == 1


@pytest.mark.parametrize(
    "more",
    [
        {"images": ["a.png"]},
        {
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
            ]
        },
        {"prompt": [{"role": "user", "content": [{"type": "input_audio", "text": "?"}]}]},
    ],
)
def test_a_row_that_shows_or_plays_something_is_a_named_fault(more):
    row = Row({"prompt": "q", "chosen": "a", "rejected": "b"} | more, "rows:1")
    with pytest.raises(BadPairError, match="only text is trained on") as error:
        parse_pairs(row)
    assert error.value.reason == NOT_TEXT


def test_empty_media_fields_are_no_reason_to_refuse_a_row():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "images": None, "audios": []}
    assert parse_pairs(Row(row, "rows:1"))


def test_a_null_field_of_a_message_is_as_if_it_were_absent():
    """Tables have every field in every message."""
    turn = {"role": "user", "content": "q", "name": None, "tool_calls": None}
    [found] = parse_pairs(Row({"prompt": [turn], "chosen": "a", "rejected": "b"}, "rows:1"))
    assert found.prompt == ({"role": "user", "content": "q"},)


def test_a_wrong_guess_is_overridden():
    record = {"instruction": "i", "chosen": "a", "rejected": "b"}
    row = Row(record, "rows:1")
    assert find_schema(row).name == "alpaca"
    assert find_schema(row, RowRules(schema="whole-strings")).name == "whole-strings"
    with pytest.raises(DataError, match="rows:1: `conversations` must be a list of turns"):
        parse_pairs(row, RowRules(schema="sharegpt"))


def test_reading_is_pure_and_gives_what_a_row_says_with_margin_and_weight():
    rows = [Row({"prompt": "q", "chosen": "a", "rejected": "b", "m": 2, "w": "0.5"}, "rows:1")]
    report = PairsReport("rows", 64)
    [one] = parse_rows(rows, RowRules(margin="m", weight="w"), report)
    assert (one.example.prompt, one.margin, one.weight) == ("q", 2.0, 0.5)
    assert json.loads(json.dumps(report.to_dict()))["schemas"] == {"strings": 1}


def test_an_answer_that_only_calls_a_tool_says_something():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    row = {"prompt": "q", "chosen": [call], "rejected": [{"role": "assistant", "content": "b"}]}
    [found] = parse_pairs(Row(row, "rows:1"))
    assert found.chosen[0]["content"] == ""
    silent = {"role": "assistant", "content": "", "tool_calls": []}
    [bad] = parse_row(Row(row | {"chosen": [silent]}, "rows:1"))
    assert bad.reason == EMPTY_COMPLETION
