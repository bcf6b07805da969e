"""Stream one answer, with a KV cache that is reused between the turns of a chat."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from time import perf_counter
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.generation.context import FinishReason
from mlx_dpo.generation.decode import StreamingDecoder, TextPart, make_thinking_splitter
from mlx_dpo.generation.sampling import Sampler, make_logits_processors, stream_tokens


class PromptCache:
    """A KV cache of mlx-lm (`layers`), and the `tokens` whose keys and values it contains."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self.layers: list[Any] = make_prompt_cache(self._model)
        self.tokens: list[int] = []

    def reuse_for(self, prompt: Sequence[int]) -> list[int]:
        """Trim the cache to its common prefix with `prompt`; return the other tokens of `prompt`.

        At least one token is returned. The caller has to run the model on the returned tokens
        next, because `self.tokens` already includes them.
        """
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if not self._trim(len(self.tokens) - shared):
            shared = 0
        if shared == 0:
            self.reset()
        self.tokens = list(prompt)
        return list(prompt[shared:])

    def _trim(self, surplus: int) -> bool:
        """Remove the last `surplus` tokens from the cache, and return whether that was possible."""
        if surplus == 0:
            return True
        if surplus == len(self.tokens) or not can_trim_prompt_cache(self.layers):
            return False
        # A chunked cache may have dropped what a longer trim would need.
        return all(layer.trim(surplus) == surplus for layer in self.layers)


@dataclass(frozen=True, slots=True)
class GenerationSummary:
    """Token counts and speed of a complete answer."""

    tokens: int  # of the answer, without the end token
    finish_reason: FinishReason
    prompt_tokens: int  # of the whole conversation
    cached_tokens: int  # prompt tokens that were in the prompt cache
    seconds_to_first: float
    tokens_per_second: float | None  # after the first token; None if there was no other
    dropped_turns: int = 0  # turns for which the context had no room


@dataclass(frozen=True, slots=True)
class AnswerChunk:
    """The next part of a streamed answer; only the last chunk has a summary."""

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
    max_tokens: int,
    dropped_turns: int = 0,
) -> Generator[AnswerChunk]:
    """Yield the model's answer to `prompt` (token ids) in chunks, at most `max_tokens` tokens.

    `max_tokens` is less than `sampling.max_tokens` if the context has no room for more.
    `dropped_turns` is the number of turns left out of the prompt; it only appears in the summary.
    """
    clock, ended = _Clock(), False
    decoder, splitter = StreamingDecoder(tokenizer), make_thinking_splitter(tokenizer, prompt)
    try:
        uncached = cache.reuse_for(prompt)
        cached = prompt[: len(prompt) - len(uncached)]
        tokens = stream_tokens(
            model,
            uncached,
            max_tokens=max_tokens,
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
                yield from _as_chunks(splitter.feed(decoder.add(token)))
    except GeneratorExit:
        raise
    except BaseException:
        cache.reset()  # it may lack some of the prompt, or a forward pass was interrupted
        raise
    yield from _as_chunks([*splitter.feed(decoder.finish()), *splitter.finish()])
    limit: FinishReason = "length" if max_tokens == sampling.max_tokens else "context"
    summary = GenerationSummary(
        tokens=clock.ticks - ended,
        finish_reason="stop" if ended else limit,
        prompt_tokens=len(prompt),
        cached_tokens=len(cached),
        seconds_to_first=clock.seconds_to_first,
        tokens_per_second=clock.rate,
        dropped_turns=dropped_turns,
    )
    yield AnswerChunk("", summary=summary)


def _as_chunks(parts: Iterable[TextPart]) -> Iterator[AnswerChunk]:
    return (AnswerChunk(part.text, part.thinking) for part in parts)


class _Clock:
    """A counter of an answer's tokens, and of the time that they take."""

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
