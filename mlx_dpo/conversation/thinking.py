"""A model's text, parted into what it thinks and what it answers, while it comes."""

from collections.abc import Iterator
from typing import NamedTuple


class Part(NamedTuple):
    """A bit of text; the marks of thinking belong to it."""

    text: str
    thinking: bool


class ThinkingSplit:
    """Parts of a stream: text between `start` and `end` is thinking, the marks with it.

    `within` says that the prompt has begun the thinking. The texts of all parts together are
    what was fed.
    """

    def __init__(self, start: str | None, end: str | None, *, within: bool = False) -> None:
        self._marks = (start, end)
        self._within = within and end is not None
        self._held = ""  # may be the beginning of a mark

    def feed(self, text: str) -> Iterator[Part]:
        """The parts that are certain now."""
        self._held += text
        while (mark := self._marks[self._within]) and mark in self._held:
            before, _, self._held = self._held.partition(mark)
            if self._within:
                yield Part(before + mark, True)
            else:
                yield from _nonempty(before, False)
                yield Part(mark, True)
            self._within = not self._within
        kept = _overlap(self._held, mark or "")
        out, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        yield from _nonempty(out, self._within)

    def finish(self) -> Iterator[Part]:
        """What is left when no text follows."""
        out, self._held = self._held, ""
        yield from _nonempty(out, self._within)


def _nonempty(text: str, thinking: bool) -> Iterator[Part]:
    if text:
        yield Part(text, thinking)


def _overlap(text: str, mark: str) -> int:
    """Letters at the end of `text` that `mark` may begin with."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)
