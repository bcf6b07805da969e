"""Checks of API requests: nothing ends the server, and no field is ignored in silence."""

import pytest

from mlx_dpo.chat.requests import find_request_error

TEXT = {"role": "user", "content": "hi"}
VOCAB_SIZE = 300


def request_error(**body):
    return find_request_error(body, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [TEXT]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [TEXT], "n": 1, "response_format": {"type": "text"}, "tool_choice": "auto"},
        {"messages": [TEXT], "n": None, "stop": None, "seed": None, "logit_bias": None},
        {"messages": [TEXT], "stop": "a", "top_k": 299, "seed": 2**64 - 1},
        {"messages": [TEXT], "stop": ["a", "b"], "logit_bias": {"0": 1, "299": 1}},
        {"messages": [TEXT], "stream_options": {}, "chat_template_kwargs": {"thought": True}},
        {"prompt": "The cat", "echo": False, "best_of": 1, "suffix": ""},
        {
            "messages": [TEXT],
            "user": "me",
            "metadata": {},
            "store": False,
        },  # without effect on the answer
        {"messages": [TEXT], "tool_choice": "none"},
    ],
)
def test_supported_requests_pass(body):
    assert request_error(**body) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "`n` is not supported here (found 2); leave it out"),
        ({"best_of": 3}, "`best_of` is not supported here"),
        ({"echo": True}, "`echo` is not supported here"),
        ({"suffix": "."}, "`suffix` is not supported here"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported here"),
        ({"tool_choice": "required"}, "`tool_choice` is not supported here"),
        ({"tool_choice": "none", "tools": [{}]}, "`tool_choice` none is not supported here"),
        ({"functions": [{"name": "f"}]}, "`functions` is not supported here"),
        ({"reasoning_effort": "high"}, "`reasoning_effort` is not supported here"),
        ({"prompt": ["a", "b"]}, "`prompt` must be one non-empty text, found ['a', 'b']"),
        ({"prompt": [5, 6]}, "`prompt` must be one non-empty text"),
        ({"prompt": ""}, "`prompt` must be one non-empty text"),
        ({"messages": "hi"}, "`messages` must be a list of objects"),
        ({"messages": ["hi"]}, "`messages` must be a list of objects"),
        ({"messages": [{"role": "user", "content": 3}]}, "`content` must be text, found 3"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a part of type 'str'; only text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part of type 'text'"),
        ({"stop": [""]}, "`stop` must be a non-empty text or a list of such, found ['']"),
        ({"stop": [3]}, "`stop` must be a non-empty text"),
        ({"top_k": 300}, "`top_k` must be below the vocabulary size of 300, found 300"),
        ({"seed": -1}, "`seed` must be from 0 to"),
        ({"seed": 2**64}, "`seed` must be from 0 to"),
        ({"logit_bias": {"300": 1}}, "`logit_bias` must name tokens from 0 to 299, found '300'"),
        ({"logit_bias": {"-1": 1}}, "`logit_bias` must name tokens from 0 to 299, found '-1'"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "cannot set chat_template"),
        ({"chat_template_kwargs": [1]}, "`chat_template_kwargs` must be an object"),
        ({"stream_options": [1]}, "`stream_options` must be an object"),
    ],
)
def test_fields_that_would_be_ignored_or_end_the_server_are_named(body, message):
    assert message in request_error(**body)


@pytest.mark.parametrize("kind", ["image_url", "input_image", "image", "input_audio", "file"])
def test_only_text_parts_of_a_message_are_accepted(kind):
    part = {"type": kind, kind: {"url": "http://127.0.0.1:1/x"}}
    message = {"role": "user", "content": [{"type": "text", "text": "see"}, part]}
    assert request_error(messages=[message]) == (
        f"`messages` contain a part of type {kind!r}; only text is read"
    )
