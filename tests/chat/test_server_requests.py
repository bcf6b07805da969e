"""What the server is asked before mlx-lm sees it: that it goes on, and does what was asked."""

import pytest
from mlx_lm.server import CompletionRequest

from mlx_dpo.chat.server import SynchronizedResponseGenerator, find_request_error

TEXT = {"role": "user", "content": "hi"}
VOCABULARY = 300


def wrong(**body):
    return find_request_error(body, vocab_size=VOCABULARY)


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
        {"messages": [TEXT], "user": "me", "metadata": {}, "store": False},  # change no answer
        {"messages": [TEXT], "tool_choice": "none"},
    ],
)
def test_what_is_done_as_asked_is_let_through(body):
    assert wrong(**body) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "`n` is not served here (found 2); leave it out"),
        ({"best_of": 3}, "`best_of` is not served here"),
        ({"echo": True}, "`echo` is not served here"),
        ({"suffix": "."}, "`suffix` is not served here"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not served here"),
        ({"tool_choice": "required"}, "`tool_choice` is not served here"),
        ({"tool_choice": "none", "tools": [{}]}, "`tool_choice` none is not served here"),
        ({"functions": [{"name": "f"}]}, "`functions` is not served here"),
        ({"reasoning_effort": "high"}, "`reasoning_effort` is not served here"),
        ({"prompt": ["a", "b"]}, "`prompt` must be text, one for a request, found ['a', 'b']"),
        ({"prompt": [5, 6]}, "`prompt` must be text"),
        ({"prompt": ""}, "`prompt` must be text"),
        ({"messages": "hi"}, "`messages` must be a list of objects"),
        ({"messages": ["hi"]}, "`messages` must be a list of objects"),
        ({"messages": [{"role": "user", "content": 3}]}, "`content` must be text, found 3"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a part of type 'str'; only text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part of type 'text'"),
        ({"stop": [""]}, "`stop` must be a non-empty text or a list of such, found ['']"),
        ({"stop": [3]}, "`stop` must be a non-empty text"),
        ({"top_k": 300}, "`top_k` must be below the vocabulary of 300 tokens, found 300"),
        ({"seed": -1}, "`seed` must be from 0 to"),
        ({"seed": 2**64}, "`seed` must be from 0 to"),
        ({"logit_bias": {"300": 1}}, "`logit_bias` must name tokens from 0 to 299, found '300'"),
        ({"logit_bias": {"-1": 1}}, "`logit_bias` must name tokens from 0 to 299, found '-1'"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "cannot say chat_template"),
        ({"chat_template_kwargs": [1]}, "`chat_template_kwargs` must be an object"),
        ({"stream_options": [1]}, "`stream_options` must be an object"),
    ],
)
def test_what_would_be_passed_over_or_end_the_server_is_named(body, message):
    assert message in wrong(**body)


@pytest.mark.parametrize("kind", ["image_url", "input_image", "image", "input_audio", "file"])
def test_nothing_but_text_is_read_of_a_message(kind):
    part = {"type": kind, kind: {"url": "http://127.0.0.1:1/x"}}
    message = {"role": "user", "content": [{"type": "text", "text": "see"}, part]}
    assert wrong(messages=[message]) == (
        f"`messages` hold a part of type {kind!r}; only text is read here"
    )


def test_a_prompt_of_no_tokens_never_reaches_the_model():
    class Silent:
        def encode(self, text):
            return []

    generator = SynchronizedResponseGenerator.__new__(
        SynchronizedResponseGenerator
    )  # its thread is not begun
    request = CompletionRequest("text", "\u200b", [], None, None)
    with pytest.raises(ValueError, match="the prompt is empty"):
        generator._tokenize(Silent(), request, None)
