"""Limits on time and size of the rendering of a chat template.

A template comes with a model and is a program. Everything that it builds is measured before or
while it is built: the characters of a text, the entries of lists and of nested lists.
"""

import time
from collections.abc import Iterable, Mapping, MappingView
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from jinja2.utils import Namespace

MAX_STEPS = 10_000_000  # rounds of loops and calls in one rendering
MAX_SECONDS = 30.0  # of computation in one rendering
MAX_SIZE = 1 << 21  # of one value, for a conversation without text
SIZE_PER_INPUT = 16  # what a character of the conversation adds to it
TOTAL_PER_SIZE = 16  # of everything that one rendering builds
MAX_DEPTH = 200  # of nested lists
MAX_BITS = 100_000  # of a whole number
CHECK_TIME_EVERY = 256  # steps
PLAIN = frozenset({str, int, float, bool, type(None)})
LARGE = 1 << 16  # size from which a value is worth a look at the time


class UnusableTemplateError(TemplateError):
    """A chat template cannot be used at all, whatever the messages."""


class TemplateLimitError(UnusableTemplateError):
    """A chat template computes for too long, or builds a value that is too large."""


class ValueSize(NamedTuple):
    """Size of a value with everything in it, and how deeply its lists are nested."""

    size: int
    depth: int = 0


class Budget:
    """Remaining steps and sizes of one rendering.

    Args:
        inputs: what the template is given; a longer conversation may become a longer text.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self._inputs = inputs
        self._max_size = MAX_SIZE
        self._counts_inputs = False
        self._steps = 0
        self._total = 0
        self._begin = time.thread_time()  # of this thread: other work on the machine does not count
        self._extents: dict[
            int, tuple[Any, ValueSize]
        ] = {}  # with the value, so that ids stay valid

    def step(self) -> None:
        """Count a round of a loop, or a call.

        Raises:
            TemplateLimitError: there were too many, or they take too long.
        """
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TemplateLimitError(f"the chat template takes more than {MAX_STEPS:,} steps")
        if not self._steps % CHECK_TIME_EVERY:
            self._check_time()

    def check_size(self, size: int) -> None:
        """Raise `TemplateLimitError` if no value of this size may be built."""
        if size > self._max_size and size > self._size_limit():
            raise TemplateLimitError(
                f"the chat template builds a text or list of more than {self._size_limit():,} "
                "characters or entries"
            )

    def admit(self, value: Any) -> Any:
        """Return a new value after counting it.

        Raises:
            TemplateLimitError: the value is too large, or all values together are.
        """
        kind = type(value)
        if kind is str:
            size = new = len(value)
        elif kind in (bool, type(None), float):
            return value
        elif kind is int:
            return self._admit_integer(value)
        else:
            size, new = self.extent(value).size, len(value) if hasattr(value, "__len__") else 1
        self.check_size(size)
        self._total += new
        if self._total > TOTAL_PER_SIZE * self._max_size:
            self._check_total()
        if size > LARGE:
            self._check_time()
        return value

    def extent(self, value: Any) -> ValueSize:
        """Return the extent of a value.

        Raises:
            TemplateLimitError: lists are nested too deeply, or a namespace is inside a value.
        """
        if isinstance(value, str | bytes):
            return ValueSize(len(value) + 1)
        if not isinstance(value, list | tuple | set | frozenset | Mapping | MappingView):
            return ValueSize(1)
        if (known := self._extents.get(id(value))) is not None:
            return known[1]
        extent = self._sum(value)
        if not isinstance(value, MappingView):  # a view is created each time
            self._extents[id(value)] = (value, extent)
        return extent

    def _sum(self, value: Any) -> ValueSize:
        parts: Iterable[Any] = value
        if isinstance(value, Mapping):
            parts = [part for entry in value.items() for part in entry]
        size, depth = 1, 0
        for part in parts:
            if type(part) in PLAIN:  # most are, and lists may be long
                size += len(part) + 1 if type(part) is str else 1
                continue
            if isinstance(part, Namespace):
                raise TemplateLimitError("the chat template stores a namespace in another value")
            inner = self.extent(part)
            size, depth = size + inner.size, max(depth, inner.depth)
        if depth >= MAX_DEPTH:
            raise TemplateLimitError(f"the chat template nests more than {MAX_DEPTH} lists")
        return ValueSize(size, depth + 1)

    def _admit_integer(self, value: int) -> int:
        if value.bit_length() > MAX_BITS:
            raise TemplateLimitError(
                f"the chat template computes a number of more than {MAX_BITS:,} bits"
            )
        return value

    def _size_limit(self) -> int:
        if not self._counts_inputs:  # only if a value is large
            self._counts_inputs = True
            size = self.extent([v for v in self._inputs.values() if not callable(v)]).size
            self._max_size += SIZE_PER_INPUT * size
        return self._max_size

    def _check_total(self) -> None:
        limit = TOTAL_PER_SIZE * self._size_limit()
        if self._total > limit:
            raise TemplateLimitError(
                f"the chat template builds more than {limit:,} characters or entries in all"
            )

    def _check_time(self) -> None:
        if time.thread_time() - self._begin > MAX_SECONDS:
            raise TemplateLimitError(f"the chat template computes for over {MAX_SECONDS:g} seconds")
