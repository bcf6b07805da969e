"""Generated API requests: valid, invalid in one field, or with damaged JSON, from a seed."""

import json
import random
from dataclasses import dataclass

from mlx_dpo.chat.field_types import (
    Boolean,
    Choice,
    Integer,
    Number,
    Object,
    Options,
    String,
    StringMap,
    Strings,
    TokenBias,
)
from mlx_dpo.chat.request_messages import Messages, Tools
from mlx_dpo.chat.requests import CHAT, TEXT, request_fields

# Of each JSON type, and beyond what Python, C or float32 hold.
ANY_VALUES = (
    True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, -(2**63) - 1, 2**64, 10**299,
    float("nan"), float("inf"), -float("inf"), "", " ", "1", "true", "\x00", "\ud83d", "é" * 3000,
    [], [[]], [None], [1], ["a"], [{}], {}, {"a": 1}, {"": None}, {"type": "text"}, [["a"] * 9] * 9,
)  # fmt: skip
TEXTS = ("hi", "Where is the cat?", "<|end|>", "\u200b", "x" * 20, "é😀", " ", "\n")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
# Fields whose effect is to refuse the request with 404, or that choose the server's own name.
NAMES = ("model", "adapters", "draft_model")


@dataclass(frozen=True)
class Case:
    """A request and the reply that is expected."""

    path: str
    body: bytes
    is_valid: bool | None  # None if either reply is right
    field: str | None = None  # that an error must name


def request_cases(seed, count, vocab_size):
    """Yield `count` cases, the same ones for the same seed."""
    rng = random.Random(seed)
    fields = list(request_fields(vocab_size).values())
    makers = (_valid_case, _valid_case, _invalid_case, _invalid_case, _any_case, _damaged_case)
    for _ in range(count):
        yield rng.choice(makers)(rng, fields)


def _base(rng, path):
    content = {"prompt": rng.choice(TEXTS[:4] + TEXTS[4:])} if path == TEXT else {
        "messages": [{"role": "user", "content": rng.choice(TEXTS)}]
    }  # fmt: skip
    return content | {"max_tokens": rng.choice((1, 2, 3))}


def _path(rng, field=None):
    return rng.choice(field.paths if field else (CHAT, TEXT))


def _encode(body):
    return json.dumps(body).encode()


def _valid_case(rng, fields):
    path = _path(rng)
    body = _base(rng, path)
    usable = [f for f in fields if path in f.paths and f.name not in NAMES]
    for field in rng.sample(usable, rng.randrange(5)):
        value = None if rng.random() < 0.2 else valid_value(rng, field.type)
        if value is not None or field.name not in body:
            body[field.name] = value
    if body.get("stream"):
        body |= {name: None for name in ("logprobs", "top_logprobs") if name in body}
    if body.get("tools"):
        body |= {"tool_choice": "auto"}
    return Case(path, _encode(body), True)


def valid_value(rng, kind):
    """Return a value that the type accepts; None if there is none."""
    return VALID[type(kind)](rng, kind)


def _integer(rng, kind):
    near = rng.randint(kind.minimum, min(kind.maximum, kind.minimum + 50))
    return rng.choice((kind.minimum, kind.maximum, near))


def _number(rng, kind):
    middle = rng.uniform(kind.minimum, kind.maximum)
    return rng.choice((kind.minimum, kind.maximum, middle, 0, 1e-12))


def _token_bias(rng, kind):
    token = str(rng.randrange(kind.vocab_size))
    return rng.choice(({}, {token: -100}, {"0": 100, token: 0.5}))


def _options(rng, kind):
    return {name: valid_value(rng, entry) for name, entry in kind.entries.items()}


def _object(rng, kind):
    return rng.choice(({}, {"a": "b"}))


VALID = {
    Boolean: lambda rng, kind: rng.random() < 0.5,
    Integer: _integer,
    Number: _number,
    String: lambda rng, kind: rng.choice(TEXTS),
    Strings: lambda rng, kind: rng.choice(("e", ["e", "at"], ["é"] * kind.maximum, [])),
    Choice: lambda rng, kind: rng.choice(kind.values) if kind.values else None,
    TokenBias: _token_bias,
    Options: _options,
    Object: _object,
    StringMap: _object,
    Messages: lambda rng, kind: _messages(rng),
    Tools: lambda rng, kind: rng.choice(([], [TOOL], [TOOL] * 3)),
}


def _messages(rng):
    text = rng.choice(TEXTS)
    part = {"type": "text", "text": text}
    turns = [
        {"role": "system", "content": text},
        {"role": "user", "content": [part] * rng.randrange(1, 4), "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": text, "tool_call_id": "1"},
        {"role": "assistant", "content": text, "refusal": None},
    ]
    start = rng.randrange(len(turns))
    return [*turns[start : start + rng.randrange(1, 3)], {"role": "user", "content": text}]


def _invalid_case(rng, fields):
    """Return a case in which one field has a value that its type refuses."""
    field = rng.choice([f for f in fields if f.name not in NAMES])
    path = _path(rng, field)
    body = _base(rng, path)
    if rng.random() < 0.1:
        name = rng.choice(("max_token", "mirostat", "", "\ud83d", "a" * 5000, "Temperature"))
        body[name] = rng.choice(ANY_VALUES)
        return Case(path, _encode(body), False, None)
    values = [value for value in ANY_VALUES if not _accepts(field, value)]
    body[field.name] = rng.choice(values)
    return Case(path, _encode(body), False, field.name)


def _accepts(field, value):
    from mlx_dpo.chat.field_types import check_encodable

    try:
        check_encodable(value)
        field.type.parse(value)
    except ValueError:
        return False
    # Refused by what depends on other fields, or by the model.
    return True


def _any_case(rng, fields):
    """Return a case with any values in any fields, of which nothing is expected but a reply."""
    path = _path(rng)
    body = _base(rng, path)
    for field in rng.sample(fields, rng.randrange(1, 6)):
        body[field.name] = rng.choice((rng.choice(ANY_VALUES), valid_value(rng, field.type)))
    return Case(path, _encode(body), None)


def _damaged_case(rng, fields):
    """Return a case of a valid request whose JSON text is cut, doubled, nested or overwritten."""
    case = _valid_case(rng, fields)
    body = bytearray(case.body)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(body))
        match rng.randrange(5):
            case 0:
                body[start] = rng.randrange(256)
            case 1:
                del body[start : start + rng.randrange(1, 9)]
            case 2:
                body[start:start] = rng.choice((b"[" * 10**5, b"9" * 5000, b'{"a":' * 200, b"\xff"))
            case 3:
                body[start:start] = body[start : start + 20]
            case 4:
                words = (b"null", b"true", b"NaN", b"1e400", b"-1", b'""', b"[]", b"{}")
                body[start : start + 1] = rng.choice(words)
        body = body or bytearray(b"{}")
    return Case(case.path, bytes(body), None)
