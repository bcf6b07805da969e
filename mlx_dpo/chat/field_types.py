"""Types and bounds of JSON values in an API request.

Each type has a method `parse`, which returns the value in the form that the server works with, or
raises `ValueError` with a message that continues the name of the field: "must be …, found …".
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

FOUND_CHARACTERS = 80  # of a value in an error message


class FieldType(Protocol):
    """The type of a field of a request."""

    def parse(self, value: Any) -> Any:
        """Return the value in the server's form; raise `ValueError` if it has another type."""


@dataclass(frozen=True)
class Boolean:
    """True or false."""

    def parse(self, value: Any) -> bool:
        """Return the value; raise `ValueError` if it is no boolean."""
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, found {shorten(value)}")
        return value


@dataclass(frozen=True)
class Integer:
    """An integer within bounds, both included; a boolean is no integer."""

    minimum: int
    maximum: int

    def parse(self, value: Any) -> int:
        """Return the value; raise `ValueError` if it is no integer within the bounds."""
        if type(value) is not int or not self.minimum <= value <= self.maximum:
            raise ValueError(
                f"must be an integer from {self.minimum} to {self.maximum}, found {shorten(value)}"
            )
        return value


@dataclass(frozen=True)
class Number:
    """A finite number within bounds, both included; a boolean is not a number."""

    minimum: float
    maximum: float

    def parse(self, value: Any) -> float:
        """Return the value as a float; raise `ValueError` if it is not a number within the
        bounds.
        """
        is_number = type(value) in (int, float)
        if not is_number or not self.minimum <= value <= self.maximum:  # false for NaN
            raise ValueError(
                f"must be a number from {self.minimum:g} to {self.maximum:g}, "
                f"found {shorten(value)}"
            )
        return float(value)


@dataclass(frozen=True)
class String:
    """A text of bounded length in characters."""

    maximum: int
    minimum: int = 0

    def parse(self, value: Any) -> str:
        """Return the value; raise `ValueError` if it is no text of such a length."""
        if not isinstance(value, str):
            raise ValueError(f"must be a string, found {shorten(value)}")
        if len(value) < self.minimum:
            raise ValueError("must be a non-empty string, found ''")
        if len(value) > self.maximum:
            raise ValueError(f"must have at most {self.maximum:,} characters, found {len(value):,}")
        return value


@dataclass(frozen=True)
class Strings:
    """A text, or a list of texts; both become a list."""

    item: String
    maximum: int

    def parse(self, value: Any) -> list[str]:
        """Return the list; raise `ValueError` if a text or their number is out of bounds."""
        values = value if isinstance(value, list) else [value]
        if len(values) > self.maximum:
            raise ValueError(f"must have at most {self.maximum} strings, found {len(values)}")
        try:
            return [self.item.parse(text) for text in values]
        except ValueError as error:
            if isinstance(value, list):
                raise ValueError(
                    f"must be a string or a list of strings; an entry {error}"
                ) from None
            raise


@dataclass(frozen=True)
class Choice:
    """A field with a few supported values; other values would change the answer."""

    values: tuple[Any, ...]

    def parse(self, value: Any) -> Any:
        """Return the value; raise `ValueError` if it is not supported."""
        if not any(type(value) is type(known) and value == known for known in self.values):
            found = shorten(value)
            raise ValueError(
                f"has a value that is not supported here (found {found}); leave it out"
            )
        return value


@dataclass(frozen=True)
class Word:
    """One of a few words."""

    words: tuple[str, ...]

    def parse(self, value: Any) -> str:
        """Return the word; raise `ValueError` if the value is none of them."""
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(f"must be {' or '.join(self.words)}, found {shorten(value)}")
        return value


@dataclass(frozen=True)
class Object:
    """A JSON object."""

    def parse(self, value: Any) -> dict[str, Any]:
        """Return the value; raise `ValueError` if it is not an object."""
        if not isinstance(value, dict):
            raise ValueError(f"must be an object, found {shorten(value)}")
        return value


@dataclass(frozen=True)
class StringMap:
    """A JSON object whose values are texts."""

    def parse(self, value: Any) -> dict[str, str]:
        """Return the value; raise `ValueError` if it is not an object or a value is not text."""
        entries = Object().parse(value)
        if not all(isinstance(entry, str) for entry in entries.values()):
            raise ValueError(f"must be an object whose values are strings, found {shorten(value)}")
        return entries


@dataclass(frozen=True)
class Options:
    """A JSON object with known keys, each with its own type. Null is as if the key were absent."""

    entries: Mapping[str, FieldType]

    def parse(self, value: Any) -> dict[str, Any]:
        """Return the object without nulls; raise `ValueError` on an unknown key or a wrong type."""
        options = {k: v for k, v in Object().parse(value).items() if v is not None}
        for name in options:
            if name not in self.entries:
                raise ValueError(f"has no key {shorten(name)}; known are {', '.join(self.entries)}")
            try:
                options[name] = self.entries[name].parse(options[name])
            except ValueError as error:
                raise ValueError(f"is wrong: `{name}` {error}") from None
        return options


@dataclass(frozen=True)
class TokenBias:
    """A bias for each of some tokens, by token id.

    MLX checks no bounds: an id beyond the vocabulary would write into other memory.
    """

    vocab_size: int
    bias: Number

    def parse(self, value: Any) -> dict[str, float]:
        """Return the biases; raise `ValueError` if a key is not a token id or a bias is not a
        number.
        """
        biases = {}
        for token, bias in Object().parse(value).items():
            # Not "007": two keys would name one token.
            if not re.fullmatch("0|[1-9][0-9]{0,8}", token) or int(token) >= self.vocab_size:
                raise ValueError(
                    f"must name tokens from 0 to {self.vocab_size - 1}, found {shorten(token)}"
                )
            try:
                biases[token] = self.bias.parse(bias)
            except ValueError as error:
                raise ValueError(f"is wrong: the bias of token {token} {error}") from None
        return biases


def shorten(value: Any) -> str:
    """Return a value as it is shown in an error message: on one line, and short."""
    shown = repr(value)
    return shown if len(shown) <= FOUND_CHARACTERS else shown[: FOUND_CHARACTERS - 1] + "…"


def check_encodable(value: Any) -> None:
    """Raise `ValueError` if a JSON value contains what UTF-8 or JSON cannot express.

    Python's JSON parser accepts half of a surrogate pair, and numbers that are not finite.
    """
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and any("\ud800" <= c <= "\udfff" for c in _non_ascii(item)):
            raise ValueError(f"contains an unpaired surrogate (found {shorten(ascii(item)[1:-1])})")
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"contains a number that is not finite (found {item})")


def _non_ascii(text: str) -> str:
    return "" if text.isascii() else text
