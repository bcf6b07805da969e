import pytest

from mlx_dpo.errors import DIFFERENT_PROMPTS, EMPTY_COMPLETION, SAME_TEXT, BadPairError, DataError
from mlx_dpo.schemas import parse_pairs
from mlx_dpo.schemas.messages import MAX_TEXT, parse_message
from mlx_dpo.schemas.schema import Row


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def only(row):
    [found] = parse_pairs(row)
    return found


def read(**record):
    found = only(Row(record, "pairs.jsonl:7"))
    assert found.location == "pairs.jsonl:7"
    return found.prompt, found.chosen, found.rejected


def test_strings_are_unchanged():
    assert read(prompt=" hi\n", chosen=" yo ", rejected="no") == (" hi\n", " yo ", "no")


def test_messages_keep_all_their_fields():
    named = user("hi") | {"name": "Ada"}
    prompt, chosen, rejected = read(
        prompt=[system("be kind"), named], chosen=[assistant("yo")], rejected=[assistant("no")]
    )
    assert prompt == (system("be kind"), named)
    assert (chosen, rejected) == ((assistant("yo"),), (assistant("no"),))


def test_a_string_after_messages_is_a_message_of_the_assistant():
    prompt = [user("hi")]
    assert read(prompt=prompt, chosen="yo", rejected="no") == (
        (user("hi"),), (assistant("yo"),), (assistant("no"),)
    )  # fmt: skip


def test_a_string_before_messages_is_a_message_of_the_user():
    assert read(prompt="hi", chosen=[assistant("yo")], rejected=[assistant("no")]) == (
        (user("hi"),), (assistant("yo"),), (assistant("no"),)
    )  # fmt: skip


def test_the_shared_leading_messages_are_the_prompt():
    shared = [system("s"), user("a"), assistant("b"), user("c")]
    expected = (tuple(shared), (assistant("yo"),), (assistant("no"),))
    both = {"chosen": [*shared, assistant("yo")], "rejected": [*shared, assistant("no")]}
    assert read(**both) == expected
    assert read(prompt="c", **both) == expected  # as UltraFeedback is often written
    assert read(prompt=None, **both) == expected


def test_a_shared_first_reply_belongs_to_the_completions():
    start = [user("a"), assistant("well")]
    prompt, chosen, _ = read(chosen=[*start, assistant("yes")], rejected=[*start, assistant("no")])
    assert (prompt, chosen) == ((user("a"),), (assistant("well"), assistant("yes")))


def test_a_prompt_missing_from_the_conversations_is_an_error():
    with pytest.raises(DataError, match="`chosen` begins with a prompt that differs"):
        read(
            prompt="other",
            chosen=[user("hi"), assistant("yo")],
            rejected=[user("hi"), assistant("no")],
        )


def test_the_prompt_of_a_marked_dialogue_runs_to_its_last_answer():
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert read(chosen=shared + " I do", rejected=shared + " I do not") == (
        shared, " I do", " I do not",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: hi A: yes", "Q: hi A: no", "Q: hi A:"),
        ("The cat sat", "The cat sang", "The cat"),  # not «The cat sa»
        ("The cat sat", "The cat sat down", "The cat sat"),
        ("one\nyes", "one\nno", "one\n"),  # a newline is the prompt's
        ("yes", "no", ""),
        ("yes", "yesterday", ""),
    ],
)
def test_unmarked_text_is_split_at_a_word_with_the_space_in_the_completion(
    chosen, rejected, prompt
):
    if chosen == prompt:
        with pytest.raises(BadPairError, match=EMPTY_COMPLETION):
            read(chosen=chosen, rejected=rejected)
        return
    expected = (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    assert read(chosen=chosen, rejected=rejected) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "missing `rejected` (found `chosen`, `prompt`); if a column has another name, "
            "--column rejected=NAME",
        ),
        (
            {"prompt": "a", "rejected": "b"},
            "missing `chosen` (found `prompt`, `rejected`); if a column has another name, "
            "--column chosen=NAME",
        ),
        (
            {"question": "a", "good": "b", "bad": "c"},
            "missing `chosen` (found `bad`, `good`, `question`); did you mean "
            "--column prompt=question --column chosen=good --column rejected=bad?",
        ),
        (
            {"prompt": "a", "chosen": "b", "worse": "c"},
            "missing `rejected` (found `chosen`, `prompt`, `worse`); did you mean "
            "--column rejected=worse?",
        ),
        (
            {},
            "missing `chosen` (found nothing); if a column has another name, --column chosen=NAME",
        ),
        (
            {"prompt": "a", "chosen": 3, "rejected": "b"},
            "`chosen` must be text or a list of messages, found int",
        ),
        (
            {"prompt": [], "chosen": "a", "rejected": "b"},
            "`prompt` must be text or a list of messages, found an empty list",
        ),
        (
            {"prompt": "a", "chosen": [assistant("b")], "rejected": [{"role": "assistant"}]},
            "`rejected[0]` needs a text `content`",
        ),
        (
            {"prompt": [user("a"), {"content": "x"}], "chosen": "b", "rejected": "c"},
            "`prompt[1]` needs a text `role`",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": [assistant("c")]},
            "one of `chosen` and `rejected` is text, and the other is messages",
        ),
        (
            {"prompt": [user("a")], "chosen": [user("b")], "rejected": [assistant("c")]},
            "`chosen` has a turn of `user`; with a `prompt` it may contain only the assistant's "
            "turns",
        ),
        (
            {"chosen": [assistant("b")], "rejected": [assistant("c")]},
            "missing `prompt` (`chosen` begins with the assistant's turn); add it, or begin both "
            "conversations with it",
        ),
        (
            {"messages": [user("a")], "chosen": "b", "rejected": "c"},
            "missing `prompt`, and the answers are text (found `messages`); use "
            "--column prompt=messages",
        ),
        (
            {"prompt": "a", "chosen": "b\ud83d", "rejected": "c"},
            "`chosen` contains an unpaired surrogate (\\ud83d at 1); fix the text",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [1]},
            "`tools` must be a list of objects, or JSON text of one",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c",
             "chat_template_kwargs": {"tokenize": 1}},
            "`chat_template_kwargs` cannot set tokenize",
        ),
        (
            {"prompt": [user("a")], "chosen": [assistant("b") | {"tool_calls": [{"x": 1}]}],
             "rejected": [assistant("c")]},
            "`chosen[0]` must have as `tool_calls` a list of objects with a `name`",
        ),
        (
            {"completions": ["a", "b"], "prompt": "x"},
            "missing ratings of the completions (looked for overall_score, score, rating, reward, "
            "rank)",
        ),
        (
            {"completions": ["a", "b"], "scores": [1], "prompt": "x"},
            "1 ratings for 2 completions; give one rating per completion",
        ),
        (
            {"conversations": [{"from": "boss", "value": "a"}], "chosen": "b", "rejected": "c"},
            "`conversations[0]` is from `boss`, not one of human, user, gpt, assistant, model, "
            "chatgpt, system, function_call, observation, tool, function_response",
        ),
        (
            {"prompt": "a", "label": True},
            "unpaired data (a single answer with a `label`), not preference pairs; use "
            "--loss-type kto, or --pair-labelled if prompts have good and bad answers",
        ),
    ],
)  # fmt: skip
def test_a_row_without_a_pair_is_an_error_with_its_location(record, message):
    with pytest.raises(DataError) as error:
        only(Row(record, "pairs.jsonl:7"))
    assert str(error.value) == f"pairs.jsonl:7: {message}"
    assert not isinstance(error.value, BadPairError)  # such rows cannot be dropped


CONVERSATION = [user("a"), assistant("b")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": " \n", "rejected": "b"}, EMPTY_COMPLETION),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, EMPTY_COMPLETION),
        (
            {"prompt": "a", "chosen": [assistant("")], "rejected": [assistant("b")]},
            EMPTY_COMPLETION,
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, SAME_TEXT),
        ({"chosen": CONVERSATION, "rejected": CONVERSATION}, SAME_TEXT),
        ({"chosen": [*CONVERSATION], "rejected": [user("x"), assistant("b")]}, DIFFERENT_PROMPTS),
        (
            {
                "chosen": [*CONVERSATION, user("c"), assistant("d")],
                "rejected": [user("a"), assistant("x"), user("c"), assistant("e")],
            },
            DIFFERENT_PROMPTS,
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: e",
            },
            DIFFERENT_PROMPTS,
        ),
    ],
)
def test_a_pair_without_a_preference_is_a_bad_pair(record, reason):
    with pytest.raises(BadPairError) as error:
        only(Row(record, "pairs.jsonl:12"))
    assert error.value.reason == reason
    assert str(error.value) == (
        f"pairs.jsonl:12: {reason}; fix it, or drop such pairs with --bad-pairs drop"
    )


def test_a_pair_may_have_a_label():
    assert read(prompt="a", chosen="b", rejected="c", label=True) == ("a", "b", "c")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "Hi"}, {"type": "text", "value": "Hi"}, {"text": "Hi"}, "Hi",
        {"content": "Hi"}, {"type": "text", "content": "Hi"}, {"type": "input_text", "text": "Hi"},
        {"type": "output_text", "text": "Hi"}, {"type": "text", "text": {"value": "Hi"}},
        {"type": "text", "text": "Hi", "image_url": None}, {"value": "Hi", "text": "Hi"},
    ],
)  # fmt: skip
def test_a_part_of_content_is_its_text(part):
    message = {"role": "user", "content": [part, {"text": "!"}]}
    assert parse_message(message, "m", "x:1")["content"] == "Hi!"
    if isinstance(part, dict):
        assert parse_message({"role": "user", "content": part}, "m", "x:1")["content"] == "Hi"


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"type": "image", "image": "a.png"}, BadPairError),
        ({"type": "image_url", "image_url": {"url": "a"}}, BadPairError),
        ({"image": "a.png"}, BadPairError),
        ({"type": "text", "text": "Hi", "image": "a.png"}, BadPairError),
        ({"type": "tool_use", "name": "f"}, BadPairError),
        ({"type": "text"}, DataError), ({}, DataError), (5, DataError), (None, DataError),
        ({"text": "a", "value": "b"}, DataError), ({"type": "text", "text": 5}, DataError),
    ],
)  # fmt: skip
def test_a_part_of_content_that_is_no_text_is_an_error(part, error):
    with pytest.raises(error) as raised:
        parse_message({"role": "user", "content": [part]}, "m", "x:1")
    assert type(raised.value) is error


def test_a_text_that_no_model_reads_is_refused_with_its_row():
    record = {"prompt": "Q", "chosen": "a" * (MAX_TEXT + 1), "rejected": "b"}
    with pytest.raises(DataError, match=r"^x:1: `chosen` has a text of 8,000,001 characters"):
        parse_pairs(Row(record, "x:1"))
    assert parse_pairs(Row(record | {"chosen": "a" * MAX_TEXT}, "x:1"))
