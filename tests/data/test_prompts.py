import json

import pytest

from mlx_dpo.data.prompts import (
    Prompt,
    add_system_prompt,
    make_prompt,
    read_held_out_prompts,
    read_prompts,
)
from mlx_dpo.errors import DataError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be kind"}


def rows(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "hi"}, [USER]),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"prompt": [USER, ANSWER, USER]}, [USER, ANSWER, USER]),
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER]),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, [USER]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]}, [USER]),
        # The system field is used together with the text of the prompt.
        ({"system": "be kind", "prompt": "hi", "chosen": "a", "rejected": "b"}, [SYSTEM, USER]),
        ({"system": "be kind", "prompt": "hi"}, [SYSTEM, USER]),
        ({"system": "", "prompt": "hi"}, [USER]),
        ({"system": "be kind", "prompt": "hi", "completion": "a", "label": True}, [USER]),
        (
            {
                "prompt": "hi",
                "chosen": [SYSTEM, USER, ANSWER],
                "rejected": [SYSTEM, USER, {**ANSWER, "content": "no"}],
            },
            [SYSTEM, USER],
        ),
        # Ways without a field of that name.
        ({"instruction": "hi", "output": ["a", "b"]}, [USER]),
        ({"history": "hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, [USER]),
        ({"instruction": "hi", "completions": ["a", "b"], "scores": [1, 2]}, [USER]),
        (
            {
                "input": {"messages": [SYSTEM, USER]},
                "preferred_output": [ANSWER],
                "non_preferred_output": [{**ANSWER, "content": "no"}],
            },
            [SYSTEM, USER],
        ),
        # A pair that teaches nothing still asks something.
        ({"system": "be kind", "prompt": "hi", "chosen": "", "rejected": "b"}, [SYSTEM, USER]),
        ({"prompt": "hi", "completions": ["a", "b"], "scores": [1, 1]}, [USER]),
    ],
)
def test_a_prompt_is_everything_before_the_completion(tmp_path, record, messages):
    [prompt] = read_prompts(rows(tmp_path / "p.jsonl", record))
    assert list(prompt.messages) == messages
    assert prompt.location == f"{tmp_path}/p.jsonl:1"


def test_a_text_with_turn_marks_becomes_messages(tmp_path):
    before = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: hi\n\nAssistant:"
    pair = {"chosen": f"{before} yes", "rejected": f"{before} no"}
    [prompt] = read_prompts(rows(tmp_path / "p.jsonl", pair))
    assert list(prompt.messages) == [USER, ANSWER, USER]
    assert prompt.text == before
    [extended] = add_system_prompt([prompt], "be kind")
    assert (list(extended.messages), extended.text) == ([SYSTEM, USER, ANSWER, USER], before)
    # Only where all of a row is such a text: a prompt by itself is what somebody typed.
    [prompt] = read_prompts(rows(tmp_path / "p.jsonl", {"prompt": before}))
    assert (prompt.messages[0]["content"], prompt.text) == (before, None)


def test_a_text_file_has_one_prompt_per_line_and_each_is_returned_once(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffhi\n\n  wie gäht's \r\nhi\n".encode())
    prompts = read_prompts(str(path))
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["hi", "wie gäht's"]
    assert prompts[1].location.endswith("p.txt:3")


def test_equal_prompts_have_equal_keys():
    assert make_prompt("hi", "a:1").key == make_prompt((USER,), "b:2").key != make_prompt("ho").key


def test_a_folder_gives_its_training_and_its_held_out_prompts(tmp_path):
    rows(tmp_path / "train.jsonl", {"prompt": "hi"})
    rows(tmp_path / "valid.jsonl", {"prompt": "ho"})
    assert [p.messages[0]["content"] for p in read_prompts(str(tmp_path))] == ["hi"]
    held = read_held_out_prompts(str(tmp_path))
    assert held is not None
    assert [p.messages[0]["content"] for p in held] == ["ho"]
    assert read_held_out_prompts(str(tmp_path / "train.jsonl")) is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "hi"}, r"p\.jsonl:1: missing `prompt` or `messages` \(found `question`\)"),
        ({"prompt": "  "}, r"p\.jsonl:1: the prompt is empty"),
        ({"messages": [ANSWER]}, r"p\.jsonl:1: the prompt is empty"),
        ({"prompt": "hi", "tools": [{"name": "f"}]}, r"p\.jsonl:1: prompts with `tools` are not"),
        ({"prompt": 3}, r"p\.jsonl:1: `prompt` must be text or a list of messages"),
        ({"instruction": "hi", "completions": ["a", "b"], "scores": [1, 1]}, "its answers tie"),
        (
            {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
            r"p\.jsonl:1: the row has no readable prompt \(chosen and rejected are the same text\)",
        ),
        (
            {
                "input": {"messages": [USER], "tools": [{"name": "f"}]},
                "preferred_output": [ANSWER],
                "non_preferred_output": [{**ANSWER, "content": "no"}],
            },
            r"p\.jsonl:1: prompts with `tools` are not",
        ),
    ],
)
def test_a_row_without_a_prompt_raises_an_error_with_its_location(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        read_prompts(rows(tmp_path / "p.jsonl", record))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"hi\n\xff\n", r"p\.txt:2: not UTF-8"), (b"\n \n", "contains no prompts")],
)
def test_a_text_file_without_prompts_raises_an_error(tmp_path, data, message):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_prompts(str(tmp_path / "p.txt"))


def test_a_system_turn_is_added_to_prompts_without_one():
    first, second = add_system_prompt([Prompt((USER,), "a:1"), Prompt((SYSTEM, USER))], "new")
    assert first.messages == ({"role": "system", "content": "new"}, USER)
    assert (first.location, second.messages) == ("a:1", (SYSTEM, USER))
