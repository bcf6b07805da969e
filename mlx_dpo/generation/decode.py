"""Decode generated tokens incrementally, and separate thinking from the answer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

INCOMPLETE = "\ufffd"  # the decoder's output for the bytes of an unfinished character
THINKING_TAIL = 11  # tokens at the end of a prompt in which a template may begin the thinking


class StreamingDecoder:
    """Incremental decoder, which takes one token at a time and returns the completed text.

    Unlike mlx-lm's detokenizers, the decoder keeps a leading space, which matters if a text is
    continued. The joined pieces equal the result of the tokenizer's `decode`, except for bytes that
    form no character: `decode` can then change text that the decoder has already returned.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        self._tokens: list[int] = []
        self._start = 0  # decoding starts here: a token's text may depend on the one before
        self._decoded = 0  # tokens whose text was returned

    def add(self, token: int) -> str:
        """Add a token and return the new text, which is empty while a character is incomplete."""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._start, self._decoded = self._decoded, len(self._tokens)
        return text

    def finish(self) -> str:
        """Return the remaining text after the last token was added."""
        text = self._new_text()
        self._start = self._decoded = len(self._tokens)
        return text

    def _new_text(self) -> str:
        returned = self._decode(self._tokens[self._start : self._decoded])
        return self._decode(self._tokens[self._start :])[len(returned) :]


def decode_tokens(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Return the text of `tokens`, decoded with a `StreamingDecoder`."""
    decoder = StreamingDecoder(tokenizer)
    return "".join([*map(decoder.add, tokens), decoder.finish()])


class TextPart(NamedTuple):
    """A part of a generated text: thinking (including its start and end marks) or answer."""

    text: str
    thinking: bool


class ThinkingSplitter:
    """Splitter of a streamed text into thinking and answer.

    The thinking goes from the mark `start` to the mark `end`, both included; a mark that the model
    does not have is None. `within` means that the streamed text begins inside the thinking. Joined
    together, the yielded parts give the whole text.
    """

    def __init__(self, start: str | None, end: str | None, *, within: bool = False) -> None:
        self._marks = (start, end)
        self._within = within and end is not None
        self._pending = ""  # may be the beginning of a mark

    def feed(self, text: str) -> Iterator[TextPart]:
        """Add text and yield the parts that are certainly thinking or certainly answer."""
        self._pending += text
        while (mark := self._marks[self._within]) and mark in self._pending:
            before, _, self._pending = self._pending.partition(mark)
            if self._within:
                yield TextPart(before + mark, True)
            else:
                yield from _nonempty(before, False)
                yield TextPart(mark, True)
            self._within = not self._within
        certain = len(self._pending) - _overlap(self._pending, mark or "")
        text, self._pending = self._pending[:certain], self._pending[certain:]
        yield from _nonempty(text, self._within)

    def finish(self) -> Iterator[TextPart]:
        """Yield the remaining text after the last call of `feed`."""
        text, self._pending = self._pending, ""
        yield from _nonempty(text, self._within)


def _nonempty(text: str, thinking: bool) -> Iterator[TextPart]:
    if text:
        yield TextPart(text, thinking)


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest suffix of `text` that is an incomplete prefix of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)


def make_thinking_splitter(tokenizer: Any, prompt: Sequence[int]) -> ThinkingSplitter:
    """Return a splitter for the text that a model generates after `prompt` (token ids)."""
    if not tokenizer.has_thinking:
        return ThinkingSplitter(None, None)
    tail = list(prompt[-THINKING_TAIL:])
    # Some templates begin the thinking in the prompt.
    within = tokenizer.rfind_think_start(tail) > tokenizer.rfind_think_end(tail)
    return ThinkingSplitter(tokenizer.think_start, tokenizer.think_end, within=within)


def strip_thinking(tokenizer: Any, prompt: Sequence[int], text: str) -> str:
    """Return `text`, which a model generated after `prompt` (token ids), without the thinking."""
    splitter = make_thinking_splitter(tokenizer, prompt)
    parts = [*splitter.feed(text), *splitter.finish()]
    answer = "".join(part.text for part in parts if not part.thinking)
    return answer.strip("\n") if any(part.thinking for part in parts) else answer
