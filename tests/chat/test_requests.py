"""Checks of API requests: nothing ends the server, and no field is ignored in silence."""

import json
from pathlib import Path

import pytest

from mlx_dpo.chat.field_types import Boolean, Integer, Number
from mlx_dpo.chat.requests import CHAT, TEXT, RequestError, parse_request, request_fields

MESSAGE = {"role": "user", "content": "hi"}
VOCAB_SIZE = 300
FIELDS = request_fields(VOCAB_SIZE).values()


def fields_of(kind):
    return [field for field in FIELDS if isinstance(field.type, kind)]


OPENAI_WITHOUT_EFFECT = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "x"},
}


def parse(path=CHAT, **body):
    if path == CHAT and "prompt" not in body:
        body = {"messages": [MESSAGE]} | body
    return parse_request(body, path, vocab_size=VOCAB_SIZE)


def request_error(path=CHAT, **body):
    with pytest.raises(RequestError) as caught:
        parse(path, **body)
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "developer", "content": "Be brief."}, MESSAGE]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"n": 1, "response_format": {"type": "text"}, "tool_choice": "auto"},
        {"stop": "a", "top_k": 299, "seed": 2**64 - 1},
        {"stop": ["a", "b"], "logit_bias": {"0": 1, "299": -100.0}},
        {"stream_options": {}, "chat_template_kwargs": {"thought": True}},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"tool_choice": "none"},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"logprobs": True, "top_logprobs": 20},
        OPENAI_WITHOUT_EFFECT,
    ],
)
def test_supported_requests_pass(body):
    parse(**body)


def test_plain_text_has_its_own_fields():
    parse(TEXT, prompt="The cat", echo=False, best_of=1, suffix="", user="me")
    assert request_error(TEXT, prompt="a", messages=[MESSAGE]).param == "messages"
    assert request_error(prompt="a", messages=[MESSAGE]).param == "prompt"
    assert request_error(TEXT).param == "prompt"
    assert request_error(messages=None).param == "messages"


@pytest.mark.parametrize("field", [field.name for field in FIELDS])
def test_null_is_as_if_the_field_were_absent(field):
    path = CHAT if CHAT in request_fields(VOCAB_SIZE)[field].paths else TEXT
    if field in ("messages", "prompt"):
        assert str(request_error(path, **{field: None})) == f"`{field}` is missing"
    else:
        body = {"messages": [MESSAGE]} if path == CHAT else {"prompt": "a"}
        assert parse(path, **body, **{field: None}) == parse(path, **body)


@pytest.mark.parametrize(
    "field", [f for f in FIELDS if isinstance(f.type, Integer)], ids=lambda f: f.name
)
def test_an_integer_is_no_boolean_no_fraction_and_within_its_bounds(field):
    kind = field.type
    for value in (kind.minimum, kind.maximum):
        parse(**{field.name: value})
    wrong = (True, 1.0, "1", [1], {}, -1, kind.minimum - 1, kind.maximum + 1, 10**299)
    for value in wrong:
        error = request_error(**{field.name: value})
        assert error.param == field.name
        assert str(error).startswith(f"`{field.name}` must be an integer from {kind.minimum} to ")


@pytest.mark.parametrize(
    "field", [f for f in FIELDS if isinstance(f.type, Number)], ids=lambda f: f.name
)
def test_a_number_is_finite_no_boolean_and_within_its_bounds(field):
    kind = field.type
    for value in (kind.minimum, kind.maximum, int(kind.minimum)):
        parse(**{field.name: value})
    beyond = (kind.minimum - 1e-6, kind.maximum + 1e-6, 2**63, -(2**63), 10**299, 1e308)
    for value in (True, "1", [1], {}, *beyond, float("nan"), float("inf"), -float("inf")):
        error = request_error(**{field.name: value})
        assert error.param == field.name, value


@pytest.mark.parametrize(
    "field", [f for f in FIELDS if isinstance(f.type, Boolean)], ids=lambda f: f.name
)
def test_a_boolean_is_no_number_and_no_text(field):
    for value in (1, 0, "true", [], {}):
        assert request_error(**{field.name: value}).param == field.name


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"n": 2}, "n", "`n` has a value that is not supported here (found 2); leave it out"),
        ({"n": True}, "n", "`n` has a value that is not supported here (found True)"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported here"),
        (
            {"tool_choice": "required"},
            "tool_choice",
            "`tool_choice` has a value that is not supported here",
        ),
        (
            {"functions": [{"name": "f"}]},
            "functions",
            "`functions` has a value that is not supported here",
        ),
        ({"reasoning_effort": "high"}, "reasoning_effort", "is not supported here"),
        ({"modalities": ["text", "audio"]}, "modalities", "is not supported here"),
        ({"messages": "hi"}, "messages", "must be a non-empty list of objects, found 'hi'"),
        ({"messages": []}, "messages", "must be a non-empty list of objects, found []"),
        ({"messages": ["hi"]}, "messages", "must be a non-empty list of objects"),
        ({"messages": [{"role": "user"}]}, "messages", "`messages[0]` has no `content`"),
        ({"messages": [{"content": "a"}]}, "messages", "`messages[0]` must have a `role` of"),
        ({"messages": [{"role": "x", "content": "a"}]}, "messages", "(found 'x')"),
        ({"messages": [{"role": [], "content": "a"}]}, "messages", "(found [])"),
        ({"messages": [MESSAGE, {"role": "user", "content": 3}]}, "messages", "`messages[1]` must"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages", "a part of type 'str'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "'text'"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages", "type []"),
        (
            {"stop": [""]},
            "stop",
            "must be a string or a list of strings; an entry must be a non-empty",
        ),
        ({"stop": [3]}, "stop", "an entry must be a string, found 3"),
        ({"stop": 3}, "stop", "`stop` must be a string, found 3"),
        ({"stop": ["a"] * 33}, "stop", "`stop` must have at most 32 strings, found 33"),
        ({"stop": "a" * 1001}, "stop", "must have at most 1,000 characters, found 1,001"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "must name tokens from 0 to 299, found '300'"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "must name tokens from 0 to 299, found '-1'"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "must name tokens from 0 to 299"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias", "must name tokens from 0 to 299"),
        ({"logit_bias": {"1": True}}, "logit_bias", "the bias of token 1 must be a number"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "the bias of token 1 must be a number from"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object, found [1]"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "cannot set tools"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs", "true or"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "must be an object"),
        ({"stream_options": [1]}, "stream_options", "must be an object"),
        ({"stream_options": {"usage": True}}, "stream_options", "has no key 'usage'"),
        ({"stream_options": {"include_usage": 1}}, "stream_options", "`include_usage` must be tr"),
        ({"stream": True, "logprobs": True}, "logprobs", "is not supported with `stream`"),
        ({"stream": True, "top_logprobs": 2}, "top_logprobs", "is not supported with `stream`"),
        ({"tools": {}}, "tools", "must be a non-empty list of objects"),
        ({"tools": [{"type": "function"}]}, "tools", "is not a function with a `name`"),
        ({"tools": [{"type": "web_search"}]}, "tools", "is not a function with a `name`"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
            "tool_choice",
            "`tool_choice` none is not supported here; leave `tools` out",
        ),
        (
            {"role_mapping": {"user": 1}},
            "role_mapping",
            "must be an object whose values are strings",
        ),
        ({"metadata": {"a": {}}}, "metadata", "must be an object whose values are strings"),
        ({"model": 3}, "model", "must be a string, found 3"),
        ({"model": ""}, "model", "must be a non-empty string"),
        (
            {"max_tokns": 3},
            "max_tokns",
            "is not a field of /v1/chat/completions; did you mean `max_t",
        ),
        ({"mirostat": 3}, "mirostat", "is not a field of /v1/chat/completions; leave it out"),
        ({"user": "\ud83d"}, "user", r"contains an unpaired surrogate (found '\\ud83d')"),
        ({"\ud83d": 1}, "\\ud83d", "contains an unpaired surrogate"),
        ({"metadata": {"\ud83d": "a"}}, "metadata", "contains an unpaired surrogate"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_name_of_the_field(body, param, message):
    error = request_error(**body)
    assert error.param == param
    assert message in str(error)


@pytest.mark.parametrize("prompt", [["a", "b"], [5, 6], "", 3, {}])
def test_a_prompt_is_one_non_empty_text(prompt):
    assert request_error(TEXT, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    "call",
    [
        3,
        {"function": {}},
        {"function": {"name": "f", "arguments": "{"}},
        {"function": {"name": "f", "arguments": "[1]"}},
        {"function": {"name": "f", "arguments": 3}},
        {"type": "custom", "custom": {"name": "f", "input": "x"}},
    ],
)
def test_a_call_in_the_history_names_a_function_with_json_arguments(call):
    message = {"role": "assistant", "tool_calls": [call]}
    assert "`messages[0]`" in str(request_error(messages=[message]))
    good = {"function": {"name": "f", "arguments": json.dumps({"a": 1})}}
    [read] = parse(messages=[message | {"tool_calls": [good]}])["messages"]
    assert read["tool_calls"][0]["function"]["arguments"] == {"a": 1}  # as in training


@pytest.mark.parametrize("kind", ["image_url", "input_image", "image", "input_audio", "file"])
def test_only_text_parts_of_a_message_are_accepted(kind):
    part = {"type": kind, kind: {"url": "http://127.0.0.1:1/x"}}
    message = {"role": "user", "content": [{"type": "text", "text": "see"}, part]}
    assert str(request_error(messages=[message])) == (
        f"`messages` are wrong: `messages[0]` contains a part of type {kind!r}; only text is "
        "supported"
    )


def test_settings_that_leave_only_the_most_likely_token_are_greedy():
    """mlx-lm reads a `top_p` of 0 as no limit, and cannot divide by so low a temperature."""
    for setting in ({"top_p": 0, "temperature": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}):
        request = parse(**setting)
        assert (request["temperature"], request["top_p"]) == (0, 1), setting
    assert parse(temperature=1e-8)["temperature"] == 1e-8


def test_the_newer_name_of_the_length_counts():
    assert parse(max_tokens=5, max_completion_tokens=7)["max_tokens"] == 7


def test_the_page_about_the_server_names_every_field():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert [field.name for field in FIELDS if f"`{field.name}`" not in page] == []
