"""Messages that stand in a row as text: JSON, twice encoded JSON, or Python's repr."""

import json

import pytest

from mlx_dpo.data.files import to_rows
from mlx_dpo.errors import DataError
from mlx_dpo.schemas import find_schema, parse_pairs
from mlx_dpo.schemas.messages import read_messages_in_text

ANSWER = [{"role": "assistant", "content": 'It\'s "here".\n'}]
OTHER = [{"role": "assistant", "content": "No."}]


def row(**fields):
    return next(to_rows(iter([("x:1", fields)])))


@pytest.mark.parametrize("write", [json.dumps, str, lambda value: json.dumps(json.dumps(value)),
                                   lambda value: "\n " + json.dumps(value, indent=2)])  # fmt: skip
def test_messages_as_text_are_read_as_messages(write):
    as_text = {"prompt": "Where?", "chosen": write(ANSWER), "rejected": write(OTHER)}
    lists = {"prompt": "Where?", "chosen": ANSWER, "rejected": OTHER}
    assert parse_pairs(row(**as_text)) == parse_pairs(row(**lists))
    assert find_schema(row(**as_text)).name == "messages"


@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({"conversations": json.dumps([{"from": "human", "value": "Hi"}]),
          "chosen": json.dumps({"from": "gpt", "value": "a"}),
          "rejected": json.dumps({"from": "gpt", "value": "b"})}, "sharegpt"),
        ({"prompt": "Hi", "completions": json.dumps(["a", "b"]), "scores": "[1, 2]"}, "ranked"),
        ({"instruction": "Hi", "output": json.dumps(["a", "b"])}, "alpaca"),
        ({"instruction": "Hi", "chosen": "a", "rejected": "b", "history": '[["x", "y"]]'},
         "alpaca"),
        ({"input": json.dumps({"messages": [{"role": "user", "content": "Hi"}]}),
          "preferred_output": str(ANSWER), "non_preferred_output": str(OTHER)}, "openai"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "images": "[]"}, "strings"),
    ],
)  # fmt: skip
def test_lists_as_text_are_read_in_the_fields_that_are_lists(fields, schema):
    assert find_schema(row(**fields)).name == schema
    assert len(parse_pairs(row(**fields))) == 1


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '["a"]', '[{"k": 1}]', '{"role": "admin"}', '[{"role": "user"}]', "[Ho] from me",
     '[{"role": "x", "content": "y"}, 3]', '{"from": 3, "value": "x"}', '"from me"',
     "[" * 3000 + '"role"', "{'role': __import__('os')}"],
)  # fmt: skip
def test_other_text_stays_text(text):
    assert read_messages_in_text(text) is None
    assert row(chosen=text).record == {"chosen": text}


@pytest.mark.parametrize(
    "text",
    ['[{"role": "assistant", "content": "cut',
     "[{'content': 'a', 'role': 'user'}\n {'content': 'b'}]"],
)  # fmt: skip
def test_text_that_begins_like_messages_and_cannot_be_read_is_an_error(text):
    with pytest.raises(DataError) as error:
        parse_pairs(row(prompt="Hi", chosen=text, rejected=text + "x"))
    assert str(error.value).startswith("x:1: `chosen` is text that begins like messages")


def test_messages_against_plain_text_are_an_error():
    with pytest.raises(
        DataError, match="one of `chosen` and `rejected` is text, and the other is mess"
    ):
        parse_pairs(row(prompt="Hi", chosen=json.dumps(ANSWER), rejected="No."))
