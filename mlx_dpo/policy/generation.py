"""Messages to prompt tokens, prompt tokens to completion tokens, completion tokens to text.

Knows no conversation, terminal or file. mlx-lm is imported where it is used: it takes seconds.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, redirect_stdout
from functools import partial
from typing import Any

import mlx.core as mx
from jinja2.exceptions import TemplateError

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.policy.sampling import Sampling
from mlx_dpo.preferences.boundary import knows_thinking, render
from mlx_dpo.types import Message

INCOMPLETE = "\ufffd"  # what a decoder writes for the bytes of an unfinished character
PENALTY_WINDOW = 20  # mlx-lm's own

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]


def check_thinking(tokenizer: Any) -> None:
    """Refuse a choice about thinking that the chat template cannot follow.

    Raises:
        ConfigError: the template writes the same with and without thinking.
    """
    if not knows_thinking(tokenizer):
        raise ConfigError(
            "`thinking` has no effect; the model's chat template knows no thinking mode"
        )


def prompt_tokens(
    tokenizer: Any, messages: Sequence[Message], *, thinking: bool | None = None
) -> list[int]:
    """The conversation as the chat template writes it, up to where the model is to answer.

    Thinking is off unless asked for, as in training.

    Raises:
        ModelError: the template refuses the messages.
    """
    try:
        return list(render(tokenizer, messages, open_reply=True, thinking=bool(thinking)))
    except TemplateError as error:
        raise ModelError(f"the model's chat template refuses the conversation ({error})") from None


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Plain text to be continued: begins as the tokenizer begins a text, has no end token."""
    body = list(tokenizer.encode(text, add_special_tokens=False))
    whole = list(tokenizer.encode(text))
    start = tokenizer.bos_token_id
    opened = whole[:1] == [start] and body[:1] != [start]
    return [start, *body] if opened else body


def context_length(config: Mapping[str, Any]) -> int | None:
    """Positions the model was made for, from its `config.json`; None if it does not say."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
    for part in (config, config.get("text_config") or {}):
        for name in names:
            if length := part.get(name):
                return int(length)
    return None


def make_sampler(sampling: Sampling) -> Sampler:
    """Log-probabilities (B, V) to tokens (B,). Its draws depend on the seed alone.

    MLX's global random state is neither read nor set.
    """
    from mlx_lm import sample_utils

    if sampling.temperature == 0:
        return sample_utils.greedy_sampler
    keep: list[Sampler] = []
    if sampling.top_p < 1:
        keep.append(partial(sample_utils.apply_top_p, top_p=sampling.top_p))
    if sampling.min_p > 0:
        keep.append(partial(sample_utils.apply_min_p, min_p=sampling.min_p))
    if sampling.top_k > 0:
        keep.append(partial(sample_utils.apply_top_k, top_k=sampling.top_k))
    key = mx.random.key(sampling.seeded().seed or 0)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        for narrow in keep:
            logprobs = narrow(logprobs)
        key, draw = mx.random.split(key)
        return mx.random.categorical(logprobs / sampling.temperature, key=draw)

    return sample


def make_processors(sampling: Sampling, earlier: Sequence[int] = ()) -> list[Processor]:
    """What changes logits (B, V) before the choice.

    `earlier` are the tokens of the prompt that mlx-lm does not see, because a cache holds them.
    """
    from mlx_lm.sample_utils import make_logits_processors

    if sampling.repetition_penalty == 1:
        return []
    seen = mx.array(list(earlier)[-PENALTY_WINDOW:], mx.uint32)
    [penalise] = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty, repetition_context_size=PENALTY_WINDOW
    )
    return [lambda tokens, logits: penalise(mx.concatenate([seen, mx.array(tokens)]), logits)]


def stream_tokens(
    model: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler,
    processors: list[Processor],
    cache: list[Any] | None = None,
) -> Generator[int]:
    """Tokens one by one, end tokens included; each is in `cache` when it is yielded."""
    from mlx_lm.generate import generate_step, generation_stream, wired_limit

    steps = generate_step(
        mx.array(list(prompt)),
        model,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=processors,
        prompt_cache=cache,
    )
    with ExitStack() as stack:
        with redirect_stdout(sys.stderr):  # mlx-lm prints its memory warning to stdout
            stack.enter_context(wired_limit(model, [generation_stream]))
        stack.enter_context(closing(steps))
        for token, _ in steps:
            yield token


class TextStream:
    """Tokens to text, piece by piece; the pieces together are what `decode` gives at once.

    mlx-lm's detokenizers drop a leading space, which a continued text needs. Only of bytes that
    form no character may `decode` think otherwise, since it can change what is out already.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        self._tokens: list[int] = []
        self._start = 0  # decoding starts here: a token's text may depend on the one before
        self._told = 0  # tokens whose text is out

    def add(self, token: int) -> str:
        """The text that is complete with this token; empty within a character."""
        self._tokens.append(token)
        text = self._untold()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._start, self._told = self._told, len(self._tokens)
        return text

    def finish(self) -> str:
        """What is left when no token follows."""
        text = self._untold()
        self._start = self._told = len(self._tokens)
        return text

    def _untold(self) -> str:
        told = self._decode(self._tokens[self._start : self._told])
        return self._decode(self._tokens[self._start :])[len(told) :]


def text_of(tokenizer: Any, tokens: Iterable[int]) -> str:
    """The text of all `tokens`, as a stream of them tells it."""
    stream = TextStream(tokenizer)
    return "".join([*map(stream.add, tokens), stream.finish()])
