"""Rows for instruction tuning: how they are parsed, and which turns they score."""

import json

import pytest

from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.errors import BadPairError, DataError
from mlx_dpo.schemas import parse_supervised
from mlx_dpo.schemas.schema import Row, RowRules
from tests.data.byte_tokenizer import CHAT, ByteTokenizer

RULES = RowRules(supervised=True)
LAST = RowRules(supervised=True, assistant_turns="last")


def turn(role, content):
    return {"role": role, "content": content}


USER, BOT = turn("user", "Hi?"), turn("assistant", "Yes.")
USER_2, BOT_2 = turn("user", "And?"), turn("assistant", "No.")
SYSTEM = turn("system", "Be brief.")
SHAREGPT = [
    {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."},
    {"from": "human", "value": "And?"}, {"from": "gpt", "value": "No."},
]  # fmt: skip


def read(record, rules=RULES):
    [example] = parse_supervised(Row(record, "rows:1"), rules)
    assert example.desirable and example.location == "rows:1"
    return example.prompt, example.completion


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SYSTEM, USER, BOT, USER_2, BOT_2]},
        {"messages": [SYSTEM, USER, BOT, USER_2, BOT_2, USER]},  # what nobody answers has no effect
        {"conversations": SHAREGPT, "system": "Be brief."},
        {
            "instruction": "And?", "input": "", "output": "No.",
            "system": "Be brief.", "history": [["Hi?", "Yes."]],
        },
    ],
)  # fmt: skip
def test_all_answers_of_a_conversation_are_scored_or_the_last_alone(record):
    assert read(record) == ((SYSTEM, USER), (BOT, USER_2, BOT_2))
    assert read(record, LAST) == ((SYSTEM, USER, BOT, USER_2), (BOT_2,))


def test_an_answer_before_the_first_question_is_context():
    assert read({"messages": [BOT_2, USER, BOT]}) == ((BOT_2, USER), (BOT,))


def test_turns_of_one_answer_stay_together():
    call = turn("assistant", "Let me see.")
    tool = turn("tool", "7")
    assert read({"messages": [USER, call, BOT]}, LAST) == ((USER,), (call, BOT))
    assert read({"messages": [USER, call, tool, BOT]}) == ((USER,), (call, tool, BOT))
    assert read({"messages": [USER, call, tool, BOT]}, LAST) == ((USER, call, tool), (BOT,))


def test_of_a_prompt_with_completion_the_completion_is_scored():
    assert read({"prompt": "Hi?", "completion": "Yes."}) == ("Hi?", "Yes.")
    # TRL masks the whole prompt, answers in it included.
    record = {"prompt": [USER, BOT, USER_2], "completion": [BOT_2]}
    assert read(record) == read(record, LAST) == ((USER, BOT, USER_2), (BOT_2,))
    assert read({"prompt": "Hi?", "completion": [BOT]}) == ((USER,), (BOT,))


def test_alpaca_joins_instruction_and_input():
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert read(record) == ("Add.\n1 and 2", "3")


def test_text_with_marks_of_turns_is_a_conversation():
    text = "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: And?\n\nAssistant: No."
    assert read({"text": text}) == ((USER,), (BOT, USER_2, BOT_2))


def test_of_a_pair_the_chosen_answer_is_taken():
    assert read({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}) == ("Hi?", "Yes.")
    ranked = {"prompt": "Hi?", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}
    assert read(ranked) == ("Hi?", "b")


def test_a_named_schema_reads_pairs_and_single_answers():
    rules = RowRules(supervised=True, schema="messages")
    assert read({"messages": [USER, BOT], "other": 1}, rules) == ((USER,), (BOT,))
    pair = {"prompt": [USER], "chosen": [BOT], "rejected": [BOT_2]}
    assert read(pair, rules) == ((USER,), (BOT,))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER]}, "no turn of the assistant after one of the user"),
        ({"messages": [BOT]}, "no turn of the assistant after one of the user"),
        ({"messages": "Hi?"}, "`messages` must be a list of messages, found text"),
        ({"conversations": "Hi?"}, "`conversations` must be a list of turns"),
        ({"text": "Once upon a time."}, "`text` does not say which part of it is the answer"),
        ({"question": "a", "answer": "b"}, "mean --column prompt=question --column completion=ans"),
        ({"prompt": "a"}, "(found `prompt`); write one of these fields"),
        ({"prompt": "a", "completion": 3}, "`completion` must be text or a list of messages"),
        ({"prompt": "a", "completion": [USER]}, "a turn of `user`; it may contain only"),
        ({"prompt": "a", "completion": "b", "label": True}, "use --loss-type kto, or keep the goo"),
        ({"prompt": "a", "completion": "b", "label": "0"}, "use --loss-type kto, or keep the good"),
    ],
)
def test_a_row_without_an_answer_is_an_error_that_says_what_to_do(record, message):
    with pytest.raises(DataError) as error:
        read(record)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "record", [{"prompt": "a", "completion": " "}, {"prompt": " ", "completion": "b"}]
)
def test_an_empty_part_is_a_bad_row(record):
    with pytest.raises(BadPairError, match="empty"):
        read(record)


def test_a_label_of_another_meaning_is_ignored():
    assert read({"prompt": "Hi?", "completion": "Yes.", "label": "weather"}) == ("Hi?", "Yes.")


@pytest.mark.parametrize(
    "record", [{"messages": [USER, BOT]}, {"prompt": "a", "completion": "b"},
               {"conversations": SHAREGPT}, {"instruction": "a", "output": "b"}],
)  # fmt: skip
def test_training_on_preferences_names_the_loss_for_such_rows(record, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError) as error:
        load_pairs(path, ByteTokenizer(CHAT), TokenRules())
    assert "instruction tuning on such rows, use --loss-type sft" in str(error.value)


def test_rows_of_several_schemas_are_counted_with_their_answers(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [USER, BOT, USER_2, BOT_2]},
        {"prompt": "Hi?", "completion": "Yes."},
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_pairs(path, ByteTokenizer(CHAT), TokenRules(), rows=RULES)
    talk, *others = loaded.pairs
    assert [pair.rejected for pair in loaded.pairs] == [(), (), ()]
    [gap] = talk.gaps
    assert loaded.report.chosen_tokens == sum(pair.num_scored for pair in loaded.pairs)
    assert talk.num_scored == len(talk.chosen) - (gap[1] - gap[0])
    assert others[0].chosen == others[1].chosen and not others[0].gaps
    assert loaded.report.lines()[0].endswith(
        "3 rows (schemas messages: 1, prompt-completion: 1, strings: 1)"
    )
