"""A conversation with a model: text in, pieces of text out. Knows no terminal and no files."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from mlx_dpo.conversation.cache import PromptCache
from mlx_dpo.errors import ConfigError
from mlx_dpo.policy.generation import (
    TextStream,
    check_thinking,
    make_processors,
    make_sampler,
    prompt_tokens,
    stream_tokens,
    text_tokens,
)
from mlx_dpo.policy.sampling import Sampling
from mlx_dpo.types import Message

FinishReason = Literal["stop", "length", "context"]  # the model ended; `max_tokens`; no room left


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known when an answer is complete."""

    tokens: int  # of the answer, without the end token
    finish_reason: FinishReason
    prompt_tokens: int  # of the whole conversation
    cached_tokens: int  # of these, the ones that did not go through the model again
    seconds_to_first: float
    tokens_per_second: float | None  # after the first token; None if there was no other


@dataclass(frozen=True, slots=True)
class Piece:
    """The next bit of an answer; the last one carries the summary."""

    text: str
    summary: Summary | None = None


class Chat:
    """One session: turns, prompt cache and the state of the sampler.

    `raw` continues plain text; it is the only way for a tokenizer without a chat template.
    `context` is the number of positions the model has, None for no limit.

    Raises:
        ConfigError: `system` or `thinking` has no effect, or `top_k` is not below the vocabulary.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        context: int | None = None,
        raw: bool = False,
    ) -> None:
        self.raw = raw or not tokenizer.has_chat_template
        self.sampling = sampling.seeded()
        self._model, self._tokenizer = model, tokenizer
        self._system, self.thinking, self._context = system, thinking, context
        self._cache = PromptCache(model)
        self._refuse_settings_without_effect()
        self.reset()

    def _refuse_settings_without_effect(self) -> None:
        if self.sampling.top_k >= len(self._tokenizer):
            raise ConfigError(
                f"`top_k` must be below the vocabulary of {len(self._tokenizer)} tokens, "
                f"got {self.sampling.top_k}; 0 chooses among all"
            )
        given = {"system": self._system, "thinking": self.thinking}
        for name, value in given.items():
            if self.raw and value is not None:
                raise ConfigError(f"`{name}` has no effect: no chat template is used")
        if self.thinking is not None:
            check_thinking(self._tokenizer)
        asked = [_turn("user", "?")]
        if self._system and self._prompt(asked) == prompt_tokens(self._tokenizer, asked):
            raise ConfigError("`system` has no effect; the model's chat template leaves it out")

    def reset(self) -> None:
        """Start over, as if nothing had been said: the draws start over, too."""
        self.turns: list[Message] = []
        self._sampler = make_sampler(self.sampling)

    def reply(self, text: str) -> Generator[Piece]:
        """Stream the answer to `text`. Closed early, what was said so far stays in the turns.

        Raises:
            ConfigError: the conversation leaves no room in the model's context.
            ModelError: the chat template refuses the conversation.
        """
        asked = _turn("user", text)
        prompt = self._prompt([*self.turns, asked])
        answer: str | None = None
        try:
            with closing(self._pieces(prompt, self._room(prompt))) as pieces:
                for piece in pieces:
                    answer = (answer or "") + piece.text
                    yield piece
        except GeneratorExit:
            raise
        except BaseException:
            self._cache.drop()  # stopped within a forward pass: layers may disagree
            raise
        finally:
            if answer is not None:
                self.turns += [asked, _turn("assistant", answer)]

    def _prompt(self, turns: Sequence[Message]) -> list[int]:
        if self.raw:
            return text_tokens(self._tokenizer, "\n".join(turn["content"] for turn in turns))
        system = [] if self._system is None else [_turn("system", self._system)]
        return prompt_tokens(self._tokenizer, [*system, *turns], thinking=self.thinking)

    def _room(self, prompt: Sequence[int]) -> int:
        """Tokens the answer may have."""
        if self._context is None:
            return self.sampling.max_tokens
        room = self._context - len(prompt)
        if room < 1:
            raise ConfigError(
                f"conversation: {len(prompt)} tokens leave no room for an answer (the model's "
                f"context is {self._context}); shorten it or start over"
            )
        return min(room, self.sampling.max_tokens)

    def _pieces(self, prompt: list[int], limit: int) -> Generator[Piece]:
        fresh = self._cache.rewind(prompt)
        cached = prompt[: len(prompt) - len(fresh)]
        tokens = stream_tokens(
            self._model,
            fresh,
            max_tokens=limit,
            sampler=self._sampler,
            processors=make_processors(self.sampling, cached),
            cache=self._cache.layers,
        )
        text, clock, ended = TextStream(self._tokenizer), _Clock(), False
        with closing(tokens):
            for token in tokens:
                clock.tick()
                self._cache.tokens.append(token)
                if ended := token in self._tokenizer.eos_token_ids:
                    break
                yield Piece(text.add(token))
        cut: FinishReason = "length" if limit == self.sampling.max_tokens else "context"
        yield Piece(
            text.finish(),
            Summary(
                tokens=clock.ticks - ended,
                finish_reason="stop" if ended else cut,
                prompt_tokens=len(prompt),
                cached_tokens=len(cached),
                seconds_to_first=clock.seconds_to_first,
                tokens_per_second=clock.rate,
            ),
        )


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


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}
