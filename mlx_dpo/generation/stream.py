"""One answer, streamed: a prompt and the cache that may hold some of it in, pieces of text out."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from time import perf_counter
from typing import Any, Literal, NamedTuple

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.generation.generate import (
    Sampler,
    StreamingDecoder,
    make_logits_processors,
    stream_tokens,
)


class TextPart(NamedTuple):
    """A bit of text; the marks of thinking belong to it."""

    text: str
    thinking: bool


class ThinkingSplitter:
    """Parts of a stream: text between `start` and `end` is thinking, the marks with it.

    `within` says that the prompt has begun the thinking. The texts of all parts together are
    what was fed.
    """

    def __init__(self, start: str | None, end: str | None, *, within: bool = False) -> None:
        self._marks = (start, end)
        self._within = within and end is not None
        self._held = ""  # may be the beginning of a mark

    def feed(self, text: str) -> Iterator[TextPart]:
        """The parts that are certain now."""
        self._held += text
        while (mark := self._marks[self._within]) and mark in self._held:
            before, _, self._held = self._held.partition(mark)
            if self._within:
                yield TextPart(before + mark, True)
            else:
                yield from _nonempty(before, False)
                yield TextPart(mark, True)
            self._within = not self._within
        kept = _overlap(self._held, mark or "")
        out, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        yield from _nonempty(out, self._within)

    def finish(self) -> Iterator[TextPart]:
        """What is left when no text follows."""
        out, self._held = self._held, ""
        yield from _nonempty(out, self._within)


def _nonempty(text: str, thinking: bool) -> Iterator[TextPart]:
    if text:
        yield TextPart(text, thinking)


def _overlap(text: str, mark: str) -> int:
    """Letters at the end of `text` that `mark` may begin with."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)


class PromptCache:
    """`layers` is mlx-lm's cache; `tokens` are the tokens it holds."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.drop()

    def drop(self) -> None:
        """Hold nothing."""
        self.layers: list[Any] = make_prompt_cache(self._model)
        self.tokens: list[int] = []

    def rewind(self, prompt: Sequence[int]) -> list[int]:
        """Keep what `prompt` begins with; returns its other tokens, at least one.

        The caller puts them through the model next: from here on they count as held.
        """
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if not self._trim(len(self.tokens) - kept):
            kept = 0
        if kept == 0:
            self.drop()
        self.tokens = list(prompt)
        return list(prompt[kept:])

    def _trim(self, surplus: int) -> bool:
        """Forget the last tokens; False if an architecture's cache cannot."""
        if surplus == 0:
            return True
        if surplus == len(self.tokens) or not can_trim_prompt_cache(self.layers):
            return False
        # A chunked cache may have let go of what a longer trim would need.
        return all(layer.trim(surplus) == surplus for layer in self.layers)


FinishReason = Literal["stop", "length", "context"]  # the model ended; `max_tokens`; no room left
THINKING_TAIL = 11  # tokens at the end of a prompt among which a template begins the thinking


@dataclass(frozen=True, slots=True)
class GenerationSummary:
    """What is known when an answer is complete."""

    tokens: int  # of the answer, without the end token
    finish_reason: FinishReason
    prompt_tokens: int  # of the whole conversation
    cached_tokens: int  # of these, the ones that did not go through the model again
    seconds_to_first: float
    tokens_per_second: float | None  # after the first token; None if there was no other
    left_out: int = 0  # turns that the context had no room for


@dataclass(frozen=True, slots=True)
class AnswerChunk:
    """The next bit of an answer; the last one carries the summary."""

    text: str
    thinking: bool = False
    summary: GenerationSummary | None = None


def stream_answer(  # noqa: PLR0913 (one argument for each thing an answer depends on)
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    cache: PromptCache,
    sampling: Sampling,
    sampler: Sampler,
    limit: int,
    left_out: int = 0,
) -> Generator[AnswerChunk]:
    """What the model says to the prompt, in at most `limit` tokens."""
    clock, ended = _Clock(), False
    text, split = StreamingDecoder(tokenizer), make_thinking_splitter(tokenizer, prompt)
    try:
        fresh = cache.rewind(prompt)
        cached = prompt[: len(prompt) - len(fresh)]
        tokens = stream_tokens(
            model,
            fresh,
            max_tokens=limit,
            sampler=sampler,
            processors=make_logits_processors(sampling, cached),
            cache=cache.layers,
        )
        with closing(tokens):
            for token in tokens:
                clock.tick()
                cache.tokens.append(token)
                if ended := token in tokenizer.eos_token_ids:
                    break
                yield from _as_chunks(split.feed(text.add(token)))
    except GeneratorExit:
        raise
    except BaseException:
        cache.drop()  # stopped before all of it was held, or within a forward pass
        raise
    yield from _as_chunks([*split.feed(text.finish()), *split.finish()])
    cut: FinishReason = "length" if limit == sampling.max_tokens else "context"
    summary = GenerationSummary(
        tokens=clock.ticks - ended,
        finish_reason="stop" if ended else cut,
        prompt_tokens=len(prompt),
        cached_tokens=len(cached),
        seconds_to_first=clock.seconds_to_first,
        tokens_per_second=clock.rate,
        left_out=left_out,
    )
    yield AnswerChunk("", summary=summary)


def make_thinking_splitter(tokenizer: Any, prompt: Sequence[int]) -> ThinkingSplitter:
    """How the text that follows `prompt` is parted into thinking and answer."""
    if not tokenizer.has_thinking:
        return ThinkingSplitter(None, None)
    tail = list(prompt[-THINKING_TAIL:])
    # Some templates begin to think for the model.
    within = tokenizer.rfind_think_start(tail) > tokenizer.rfind_think_end(tail)
    return ThinkingSplitter(tokenizer.think_start, tokenizer.think_end, within=within)


def strip_thinking(tokenizer: Any, prompt: Sequence[int], said: str) -> str:
    """What was said to `prompt`, without what was thought."""
    split = make_thinking_splitter(tokenizer, prompt)
    parts = [*split.feed(said), *split.finish()]
    answer = "".join(part.text for part in parts if not part.thinking)
    return answer.strip("\n") if any(part.thinking for part in parts) else answer


def _as_chunks(parts: Iterable[TextPart]) -> Iterator[AnswerChunk]:
    return (AnswerChunk(part.text, part.thinking) for part in parts)


class _Clock:
    """Counts tokens and the time they took."""

    def __init__(self) -> None:
        self.ticks = 0
        self.seconds_to_first = 0.0
        self._start = self._last = perf_counter()

    def tick(self) -> None:
        self.ticks += 1
        self._last = perf_counter()
        if self.ticks == 1:
            self.seconds_to_first = self._last - self._start

    @property
    def rate(self) -> float | None:
        if self.ticks < 2:
            return None
        return (self.ticks - 1) / (self._last - self._start - self.seconds_to_first)
