"""Replies of servers that are damaged in any way."""

import json
import random

import pytest

from mlx_dpo.errors import DPOError
from mlx_dpo.openai_client.reply import (
    UnusableReplyError,
    parse_error,
    parse_models,
    parse_reply,
    strip_thinking,
)
from tests.openai_client.fake_server import completion

VALUES = [None, True, 0, -1, 1e308, "", "\x1b[2J", "\ud800", [], {}, [[]], [None], {"text": 5}]


def damaged_bytes(data, source):
    """Return data with a flipped byte, without its end, or with a part of it twice."""
    place = source.randrange(len(data))
    return source.choice(
        [
            data[:place] + bytes([data[place] ^ 1 << source.randrange(8)]) + data[place + 1 :],
            data[:place],
            data[:place] + data[place // 2 :],
        ]
    )


def damaged_values(content, source):
    """Return a JSON value in which one part has another type, or is missing."""
    if not isinstance(content, dict | list) or not content or source.random() < 0.3:
        return source.choice(VALUES)
    copy = content.copy()
    key = source.choice(list(copy)) if isinstance(copy, dict) else source.randrange(len(copy))
    if source.random() < 0.2:
        copy.pop(key)
    else:
        copy[key] = damaged_values(copy[key], source)
    return copy


@pytest.mark.parametrize("seed", range(3))
def test_every_damaged_reply_is_read_or_refused(seed):
    source = random.Random(seed)
    parts = completion([{"type": "text", "text": "a"}])
    contents = [completion("<think>a</think>b"), parts, {"data": [{"id": "m"}]}]
    contents.append({"error": {"message": "no", "param": "p", "code": "c"}})
    for number in range(1500):
        content = source.choice(contents)
        if number % 2:
            data = damaged_bytes(json.dumps(content).encode(), source)
        else:
            data = json.dumps(damaged_values(content, source)).encode()
        try:
            strip_thinking(parse_reply(data).text).encode()
        except UnusableReplyError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        try:
            assert all(isinstance(row["id"], str) for row in parse_models(data))
        except DPOError as error:
            assert "\n" not in str(error)
        message, param, code = parse_error(data)
        assert isinstance(message, str) and len(message) < 130 and "\n" not in message
        assert all(isinstance(text, str | None) for text in (param, code))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("b", "b"),
        ("\nb\n", "\nb\n"),  # without thinking, nothing is changed
        ("<think>a</think>\n\nb\n", "b"),
        ("a</think>b", "b"),
        ("a</think>b<think>c</think>d", "bd"),
        ("<think>a", ""),
        ("<think></think>", ""),
        ("b<think>a", "b"),
        ("a < b <thin", "a < b <thin"),
    ],
)
def test_thinking_is_stripped(text, answer):
    assert strip_thinking(text) == answer
    assert strip_thinking(answer) == answer
