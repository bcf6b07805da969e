"""Rows with two answers and a verdict: which of them becomes chosen."""

import pytest

from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.report import PairsReport
from mlx_dpo.errors import BadPairError, DataError
from mlx_dpo.schemas import SCHEMAS, find_schema, parse_row
from mlx_dpo.schemas.schema import Row, RowRules

FIRST, SECOND = "the first", "the second"


def better(**verdict):
    """Return the better answer of a row, or None for a tie."""
    names = ("response_a", "response_b")
    if "names" in verdict:
        names = verdict.pop("names")
    row = Row({"prompt": "Q", names[0]: FIRST, names[1]: SECOND} | verdict, "x:1")
    assert find_schema(row).name == "compared"
    [pair] = parse_row(row)
    if isinstance(pair, BadPairError):
        return None
    assert {pair.chosen, pair.rejected} == {FIRST, SECOND}
    return pair.chosen


OUTPUTS, IDS = ("output_1", "output_2"), ("response_0", "response_1")
STEER = ("response1", "response2")


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        # AlpacaEval and AlpacaFarm: 1 or 2, shares between them, 0 and 1.5 for a tie.
        ({"names": OUTPUTS, "preference": 1}, FIRST),
        ({"names": OUTPUTS, "preference": 2.0}, SECOND),
        ({"names": OUTPUTS, "preference": "2"}, SECOND),
        ({"names": OUTPUTS, "preference": 1.2}, FIRST),
        ({"names": OUTPUTS, "preference": 1.5}, None),
        ({"names": OUTPUTS, "preference": 0}, None),
        # The LMSYS arena, also one column for each outcome.
        ({"winner": "model_a"}, FIRST),
        ({"winner": "model_b"}, SECOND),
        ({"winner": "tie"}, None),
        ({"winner": "tie (bothbad)"}, None),
        ({"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}, SECOND),
        ({"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}, None),
        ({"winner": "[[B]]"}, SECOND),
        ({"label": "response_a"}, FIRST),
        # PKU-SafeRLHF: the number of the better answer.
        ({"names": IDS, "better_response_id": 0, "safer_response_id": 1}, FIRST),
        ({"names": IDS, "better_response_id": 1}, SECOND),
        ({"names": IDS, "label": 0}, FIRST),
        # HelpSteer: below 0 if the first is better.
        ({"names": STEER, "overall_preference": -3}, FIRST),
        ({"names": STEER, "overall_preference": 1}, SECOND),
        ({"names": STEER, "overall_preference": 0}, None),
        # WebGPT: a score of each.
        ({"names": ("answer_0", "answer_1"), "score_0": -1.0, "score_1": 0.5}, SECOND),
    ],
)  # fmt: skip
def test_the_verdict_says_which_answer_is_chosen(verdict, expected):
    assert better(**verdict) == expected


@pytest.mark.parametrize(
    "verdict",
    [
        {"label": 0}, {"label": 1}, {"label": True}, {"winner": 1}, {"winner": "model_c"},
        {"names": OUTPUTS, "preference": -1}, {"names": OUTPUTS, "preference": 3},
        {"names": OUTPUTS, "label": 1}, {"names": IDS, "better_response_id": 2},
    ],
)  # fmt: skip
def test_a_verdict_with_two_meanings_or_none_is_an_error(verdict):
    with pytest.raises(DataError, match=r"^x:1: `\w+` does not say whether `"):
        better(**verdict)


def test_a_row_without_a_verdict_names_what_is_looked_for():
    with pytest.raises(DataError, match=r"^x:1: no column says whether `response_a` or .* winner"):
        better()


def turns(*texts):
    return [
        {"role": "user" if n % 2 == 0 else "assistant", "content": text}
        for n, text in enumerate(texts)
    ]


def test_arena_conversations_share_their_prompt():
    row = {"conversation_a": turns("Q", "a"), "conversation_b": turns("Q", "b"), "winner": "b"}
    [pair] = parse_row(Row(row, "x:1"))
    assert pair.prompt == tuple(turns("Q"))
    assert pair.chosen[0]["content"] == "b"
    row["conversation_b"] = turns("Q", "b", "More", "c")
    [bad] = parse_row(Row(row, "x:1"))
    assert isinstance(bad, BadPairError)


def test_lists_of_one_turn_are_text_and_of_several_are_no_pair():
    row = {"prompt": '["Q"]', "response_a": '["a"]', "response_b": '["b"]', "winner": "a"}
    [pair] = parse_row(Row(row, "x:1"))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Q", "a", "b")
    several = {name: '["x", "y"]' for name in ("prompt", "response_a", "response_b")}
    [bad] = parse_row(Row(row | several, "x:1"))
    assert isinstance(bad, BadPairError)


def margin(record, name, **renamed):
    report = PairsReport("x", 0)
    rules = RowRules(margin=name, renamed=renamed)
    [parsed] = parse_rows([Row(record, "x:1")], rules, report)
    return parsed.margin


GRADED = {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 2.0}


def test_a_code_of_the_better_answer_is_no_margin():
    with pytest.raises(
        DataError, match=r"`preference` says which answer is better and is not a mar"
    ):
        margin(GRADED, "preference", prompt="instruction", chosen="output_1", rejected="output_2")
    with pytest.raises(DataError, match="`preference` says which answer is better"):
        margin(GRADED, "preference")


def test_a_negative_margin_is_an_error_and_a_graded_verdict_has_its_size():
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    assert margin(pair | {"lead": 2}, "lead") == 2
    with pytest.raises(
        DataError, match=r"^x:1: `lead` must be a margin of at least 0, .* \(found -2\)"
    ):
        margin(pair | {"lead": -2}, "lead")
    steer = {"prompt": "Q", "response1": "a", "response2": "b", "overall_preference": -3}
    assert margin(steer, "overall_preference") == 3
    assert margin(GRADED | {"preference": 1.9}, "preference") == pytest.approx(0.8)


def test_every_field_that_decides_is_a_field_of_the_schema():
    assert {"preference", "score_b", "conversation_a", "input"} <= SCHEMAS["compared"].fields
