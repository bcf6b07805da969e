"""Mutations of files: on bytes, and on the structure of JSON-like values. All from a random source.

A mutation of bytes returns bytes. A mutation of a value returns a `Raw` text if the damaged value
cannot be written by `json.dumps` (a duplicate key, a number of thousands of digits).
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[Any, ...]  # keys and indices from the top of a value

STRANGE_TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[2J\x1b]0;title\x07",
    "\ud83d",
    "\udc00x",
    "\u2028",
    "\u202eabc",
    "\ufeffa",
    "a\r\nb",
    "a\nb",
    "\t",
    "\x7f\x9b31m",
    "{{ x }}",
    "{% raise %}",
    "<|end|>",
    "<|user|>",
    "</s>",
    "\U0010ffff",
    "e\u0301" * 30,
    "x" * 20_000,
    "[" * 3000,
    '[{"role": "user", "content": "a"}]',
    ":train:",
    "[bold]a[/bold]",
    "../../etc",
    "~/x",
    "/dev/zero",
    "%s%d",
    "NaN",
    "null",
    "-1",
    "1e999",
)
STRANGE_NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    2**64,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    float("-inf"),
    True,
    False,
)
STRANGE_VALUES = (None, {}, [], [[]], {"a": {}}, [None], {"": None}, [1, "a", None, {}])


class Raw(str):
    """A text that stands for itself in JSON."""


def mutate_bytes(data: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """Return the name of one mutation and the mutated bytes; `others` are spliced in."""
    name = draw.choice(sorted(BYTES))
    return name, BYTES[name](data, draw, others)


def mutate_value(value: Any, draw: random.Random) -> tuple[str, Any]:
    """Return the description of one mutation and a mutated copy of a JSON-like value."""
    value = copy.deepcopy(value)
    paths = list(walk(value))
    path = draw.choice(paths)
    name = draw.choice(sorted(VALUES))
    if not path:
        return f"{name} at the top", _substitute(value, draw, name)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    VALUES[name](parent, path[-1], draw)
    return f"{name} at {path!r}", value


def dump(value: Any, *, indent: int | None = None) -> bytes:
    """Write a mutated value as JSON; `Raw` texts and duplicate keys are written as they are."""
    marks: dict[str, str] = {}

    def mark(item: Any) -> Any:
        if isinstance(item, Raw):
            name = f"@raw{len(marks)}@"
            marks[f'"{name}"'] = str(item)
            return name
        if isinstance(item, dict):
            return {key: mark(entry) for key, entry in item.items()}
        if isinstance(item, list):
            return [mark(entry) for entry in item]
        return item

    text = json.dumps(mark(value), indent=indent)
    for name, raw in marks.items():
        text = text.replace(name, raw)
    return text.replace(DUPLICATE, "").encode("utf-8", "surrogatepass")


def walk(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of a value and of everything in it."""
    yield path
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(entries):
            yield from walk(item, (*path, key))


DUPLICATE = "@duplicate@"  # makes two equal keys of a dict, and is removed from the JSON


def _position(data: bytes, draw: random.Random) -> int:
    return int(draw.random() * len(data)) if data else 0


def _flip(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 1, 4, 32))):
        changed[_position(changed, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _replace(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    at = _position(data, draw)
    return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]


def _delete(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    at = _position(data, draw)
    return data[:at] + data[at + draw.choice((1, 2, 7, 64, 512)) :]


INSERTED = (
    b"\x00",
    b"\xff",
    b"\xe4",
    b"\xed\xa0\xbd",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b"\r\n",
    b"\x1b[31m",
    b'"',
    b"\\",
    b"{",
    b"]",
    b",",
    b"9" * 5000,
    b"[" * 5000,
    b" " * 5000,
    b"\x1a",
    b"\xc2\x85",
    b"#",
    b": ",
    b"- ",
    b"&a *a",
    b"!!python/object:os.system x",
)


def _insert(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    at = _position(data, draw)
    return data[:at] + draw.choice(INSERTED) + data[at:]


def _repeat(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    at = _position(data, draw)
    end = at + draw.choice((1, 8, 64, 512, 4096))
    return data[:end] + data[at:end] * draw.choice((1, 1, 3)) + data[end:]


def _truncate(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    return data[: _position(data, draw)]


def _zero(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    at = _position(data, draw)
    size = len(data[at : at + draw.choice((1, 16, 512, 4096))])
    return data[:at] + b"\0" * size + data[at + size :]


def _splice(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    other = draw.choice(others) if others else b"PK\x03\x04"
    return data[: _position(data, draw)] + other[_position(other, draw) :][:100_000]


def _swap(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    first, second = sorted((_position(data, draw), _position(data, draw)))
    size = min(draw.choice((1, 16, 256)), second - first)
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + len(b) :]


def _recode(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    text = data.decode("utf-8", "replace")
    encoding = draw.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp037"))
    return text.encode(encoding, "replace")


def _newlines(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    ends = (b"\n", b"\r\n", b"\r", b"\n\n", b"\n\r", b"\x0b", b"\xe2\x80\xa8")
    return b"".join(line + draw.choice(ends) for line in data.split(b"\n"))


def _empty(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    return draw.choice(
        (b"", b" ", b"\n", b"\0", b"null", b"0", b"[]", b"{}", b'""', b"\xef\xbb\xbf")
    )


BYTES: dict[str, Callable[[bytes, random.Random, list[bytes]], bytes]] = {
    "flip": _flip,
    "replace": _replace,
    "delete": _delete,
    "insert": _insert,
    "repeat": _repeat,
    "truncate": _truncate,
    "zero": _zero,
    "splice": _splice,
    "swap": _swap,
    "recode": _recode,
    "newlines": _newlines,
    "empty": _empty,
}


def _substitute(old: Any, draw: random.Random, name: str) -> Any:
    if name in ("number", "huge"):
        return draw.choice(STRANGE_NUMBERS) if name == "number" else Raw("9" * 5000)
    if name == "text":
        return draw.choice(STRANGE_TEXTS)
    if name == "nest":
        depth = draw.choice((5, 200, 900, 2000, 100_000))
        opened, closed = draw.choice((("[", "]"), ('{"a":', "}")))
        return Raw(opened * depth + "1" + closed * depth)
    if name == "list of it":
        return [old] * draw.choice((1, 2, 50))
    return draw.choice(STRANGE_VALUES)


def _set(name: str) -> Callable[[Any, Any, random.Random], None]:
    def change(parent: Any, key: Any, draw: random.Random) -> None:
        parent[key] = _substitute(parent[key], draw, name)

    return change


def _drop(parent: Any, key: Any, draw: random.Random) -> None:
    del parent[key]


def _double_key(parent: Any, key: Any, draw: random.Random) -> None:
    """Write a key twice, with another value; an element of a list is repeated."""
    if isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        parent[f"{key}{DUPLICATE}"] = draw.choice(("twice", None, 1, parent[key]))


def _rename(parent: Any, key: Any, draw: random.Random) -> None:
    if isinstance(parent, list):
        parent[key] = {str(key): parent[key]}
    else:
        value = parent.pop(key)
        text = str(key)
        parent[draw.choice((text.upper(), text + " ", text + "\ud83d", *STRANGE_TEXTS[:19]))] = (
            value
        )


def _add(parent: Any, key: Any, draw: random.Random) -> None:
    value = draw.choice((*STRANGE_VALUES, *STRANGE_TEXTS, *STRANGE_NUMBERS))
    if isinstance(parent, list):
        parent.insert(key, value)
    else:
        parent[draw.choice(("extra", "\x1b[31mred", "note\ud83d", "", "k" * 3000))] = value


def _swap_entries(parent: Any, key: Any, draw: random.Random) -> None:
    other = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = parent[other], parent[key]


def _change_text(parent: Any, key: Any, draw: random.Random) -> None:
    """Insert a strange text into a text; turn any other value into its JSON text."""
    old = parent[key]
    if not isinstance(old, str):
        parent[key] = json.dumps(old)
        return
    at = draw.randrange(len(old) + 1)
    parent[key] = old[:at] + draw.choice(STRANGE_TEXTS) + old[at:]


VALUES: dict[str, Callable[[Any, Any, random.Random], None]] = {
    "drop": _drop,
    "double key": _double_key,
    "rename": _rename,
    "add": _add,
    "swap": _swap_entries,
    "change text": _change_text,
    **{name: _set(name) for name in ("number", "huge", "text", "nest", "list of it", "value")},
}
