"""Rows to examples: ranked lists, labelled rows, columns, margins, and dropped pairs."""

import json

import pytest

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
from tests.data.byte_tokenizer import EOS

TOKENS = TokenRules(vocab_size=262)


def ranked(scores, how=None, /, **more):
    texts = [f"answer {i}" for i in range(len(scores))]
    record = {"prompt": "q", "completions": texts, "scores": scores} | more
    return parse_row(Row(record, "rows:1"), RowRules(ranked=how))


def pairs(found):
    return [
        (int(example.chosen[-1]), int(example.rejected[-1]))
        for example in found
        if not isinstance(example, BadPairError)
    ]


def ties(found):
    return [example.reason for example in found if isinstance(example, BadPairError)]


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
def test_a_ranked_list_makes_the_pairs_of_the_setting(how, scores, expected, tied):
    found = ranked(scores, how)
    assert pairs(found) == expected
    assert ties(found) == [TIED] * tied


def test_a_lower_rank_is_better_and_completions_may_have_scores():
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


def test_a_bad_pair_of_a_list_leaves_the_others(write, plain):
    row = {"prompt": "q", "completions": ["a", " ", "c"], "scores": [3, 2, 1]}
    with pytest.raises(BadPairError, match=EMPTY_COMPLETION):
        load_pairs(write(row), plain, TOKENS, rows=RowRules(ranked="all"))
    found = load_pairs(write(row), plain, TOKENS, rows=RowRules(ranked="all"), bad_pairs="drop")
    assert [pair.chosen for pair in found.pairs] == [(*b"a", EOS)]
    assert found.report.dropped == {EMPTY_COMPLETION: ["pairs.jsonl:1"] * 2}


def test_the_margin_may_be_the_difference_of_the_ranking_scores(write, plain):
    row = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [3, 2.5, 1]}
    [pair] = load_pairs(write(row), plain, TOKENS, rows=RowRules(margin="score")).pairs
    assert pair.margin == 2


@pytest.mark.parametrize(
    "names",
    [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
     ("chosen-score", "rejected-score"), ("score-chosen", "score-rejected")],
)  # fmt: skip
def test_scores_of_chosen_and_rejected_make_a_margin(write, plain, names):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"} | dict(zip(names, [4, 1.5], strict=True))
    found = load_pairs(write(row), plain, TOKENS, rows=RowRules(margin="score"))
    assert found.pairs[0].margin == 2.5
    assert not found.report.unused_fields
    with pytest.raises(DataError, match="`rating` must be a number"):
        load_pairs(write(row), plain, TOKENS, rows=RowRules(margin="rating"))


def labelled(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_pair_labelled_pairs_good_and_bad_completions_of_the_same_prompt(write, plain):
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


def test_rules_without_effect_raise_an_error(write, plain):
    path = write({"prompt": "q", "chosen": "a", "rejected": "b"})
    for rules, name in (
        (RowRules(ranked="all"), "ranked"), (RowRules(pair_labelled=True), "pair_labelled")
    ):  # fmt: skip
        report = load_pairs(path, plain, TOKENS, rows=rules).report
        with pytest.raises(ConfigError, match=f"`{name}` has no effect"):
            check_settings_used(TOKENS, rules, [report])


def test_columns_are_renamed_before_the_schema_is_detected():
    record = {"q": {"text": "hi"}, "good": "yo", "rejected": "no"}
    names = {"prompt": "q.text", "chosen": "good"}
    [found] = parse_pairs(rename_columns(Row(record, "rows:1"), names))
    assert (found.prompt, found.chosen, found.rejected) == ("hi", "yo", "no")
    assert rename_columns(Row(record, "rows:1"), names).record == {
        "q": {"text": "hi"}, "rejected": "no", "prompt": "hi", "chosen": "yo",
    }  # fmt: skip
    assert rename_columns(Row({"a.b": 1}, ""), {"c": "a.b"}).record == {"c": 1}


@pytest.mark.parametrize("column", ["xyz", "q.answer", "q.text.x"])
def test_a_missing_column_raises_an_error_with_the_present_columns(column):
    row = Row({"q": {"text": "hi"}, "good": "yo"}, "rows:1")
    with pytest.raises(DataError) as error:
        rename_columns(row, {"prompt": column})
    assert str(error.value) == f"rows:1: no column `{column}` (found `good`, `q`)"


def test_a_column_that_is_nearly_there_or_reversed_is_suggested():
    row = Row({"question": "hi", "chosen": "yo", "rejected": "no"}, "rows:1")
    found = "(found `chosen`, `question`, `rejected`)"
    with pytest.raises(DataError) as error:
        rename_columns(row, {"prompt": "questoin"})
    assert str(error.value) == (f"rows:1: no column `questoin` {found}; did you mean `question`?")
    with pytest.raises(DataError) as error:
        rename_columns(row, {"question": "prompt"})
    assert str(error.value) == (
        f"rows:1: no column `prompt` {found}; the name of the field comes first: "
        "--column prompt=question"
    )


def test_a_field_name_that_no_schema_has_raises_an_error(write, plain):
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
def test_a_row_with_images_audio_or_video_is_a_bad_pair(more):
    row = Row({"prompt": "q", "chosen": "a", "rejected": "b"} | more, "rows:1")
    with pytest.raises(BadPairError, match="audio and video are not supported") as error:
        parse_pairs(row)
    assert error.value.reason == NOT_TEXT


def test_empty_media_fields_are_ignored():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "images": None, "audios": []}
    assert parse_pairs(Row(row, "rows:1"))


def test_a_null_field_of_a_message_is_ignored():
    """In a table, every message has every field."""
    turn = {"role": "user", "content": "q", "name": None, "tool_calls": None}
    [found] = parse_pairs(Row({"prompt": [turn], "chosen": "a", "rejected": "b"}, "rows:1"))
    assert found.prompt == ({"role": "user", "content": "q"},)


def test_the_schema_setting_overrides_detection():
    record = {"instruction": "i", "chosen": "a", "rejected": "b"}
    row = Row(record, "rows:1")
    assert find_schema(row).name == "alpaca"
    assert find_schema(row, RowRules(schema="whole-strings")).name == "whole-strings"
    with pytest.raises(DataError, match="rows:1: `conversations` must be a list of turns"):
        parse_pairs(row, RowRules(schema="sharegpt"))


def test_parsing_has_no_side_effects_and_returns_margin_and_weight():
    rows = [Row({"prompt": "q", "chosen": "a", "rejected": "b", "m": 2, "w": "0.5"}, "rows:1")]
    report = PairsReport("rows", 64)
    [example] = parse_rows(rows, RowRules(margin="m", weight="w"), report)
    assert (example.example.prompt, example.margin, example.weight) == ("q", 2.0, 0.5)
    assert json.loads(json.dumps(report.to_dict()))["schemas"] == {"strings": 1}


def test_a_completion_of_a_tool_call_is_not_empty():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    row = {"prompt": "q", "chosen": [call], "rejected": [{"role": "assistant", "content": "b"}]}
    [found] = parse_pairs(Row(row, "rows:1"))
    assert found.chosen[0]["content"] == ""
    silent = {"role": "assistant", "content": "", "tool_calls": []}
    [bad] = parse_row(Row(row | {"chosen": [silent]}, "rows:1"))
    assert bad.reason == EMPTY_COMPLETION
