"""Messages to prompt tokens, prompt tokens to completion tokens, completion tokens to text.

Knows no conversation, terminal or file. mlx-lm is imported where it is used: it takes seconds.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, closing, redirect_stdout
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from jinja2.exceptions import TemplateError

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.tokenization.chat_template import encode_conversation, has_thinking_mode
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.types import Message

INCOMPLETE = "\ufffd"  # what a decoder writes for the bytes of an unfinished character
PENALTY_WINDOW = 20  # mlx-lm's own

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def check_thinking(tokenizer: Any) -> None:
    """Refuse a choice about thinking that the chat template cannot follow.

    Raises:
        ConfigError: the template writes the same with and without thinking.
    """
    if not has_thinking_mode(tokenizer):
        raise ConfigError(
            "`thinking` has no effect; the model's chat template knows no thinking mode"
        )


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], *, thinking: bool | None = None
) -> list[int]:
    """The conversation as the chat template writes it, up to where the model is to answer.

    Thinking is off unless asked for, as in training.

    Raises:
        ModelError: the template refuses the messages.
    """
    try:
        return list(
            encode_conversation(
                tokenizer, messages, add_generation_prompt=True, thinking=bool(thinking)
            )
        )
    except TemplateError as error:
        raise ModelError(f"the model's chat template refuses the conversation ({error})") from None


def encode_text(tokenizer: Any, text: str) -> list[int]:
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
    key = mx.random.key(sampling.with_seed().seed or 0)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        for narrow in keep:
            logprobs = narrow(logprobs)
        key, draw = mx.random.split(key)
        return mx.random.categorical(logprobs / sampling.temperature, key=draw)

    return sample


def make_logits_processors(
    sampling: Sampling, earlier: Sequence[int] = ()
) -> list[LogitsProcessor]:
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
    processors: list[LogitsProcessor],
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


class StreamingDecoder:
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


def decode_tokens(tokenizer: Any, tokens: Iterable[int]) -> str:
    """The text of all `tokens`, as a stream of them tells it."""
    stream = StreamingDecoder(tokenizer)
    return "".join([*map(stream.add, tokens), stream.finish()])


PROBE_PROMPT, PROBE_TOKENS = 64, 16


class GeneratedTokens(NamedTuple):
    """What a model said to one prompt."""

    tokens: list[int]  # without the one that ended it
    end: int | None  # the token that ended it; None where it was cut


def generate_tokens(
    model: Any, stops: AbstractSet[int], rows: Sequence[Sequence[int]], sampling: Sampling
) -> list[GeneratedTokens]:
    """A completion for each row of prompt tokens, in order.

    With `temperature` 0 these are the ones that each would get alone. They are computed together
    where the architecture's batched cache is exact, else one after another.
    """
    batched = len(rows) > 1 and is_batching_exact(model, rows)
    return (_generate_batched if batched else _generate_sequentially)(model, stops, rows, sampling)


def is_batching_exact(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Whether this architecture's batched cache gives the tokens that single prompts give.

    Tried on the shortest and the longest prompt: padding is where such caches go wrong.
    """
    pair = [min(rows, key=len)[-PROBE_PROMPT:], max(rows, key=len)[-PROBE_PROMPT:]]
    pair[0] = pair[0][: max(1, len(pair[1]) // 2)]
    probe = Sampling(max_tokens=PROBE_TOKENS)
    try:
        together = _generate_batched(model, frozenset(), pair, probe)
    except ValueError:  # mlx-lm's word for a cache that cannot be batched, MLX's for shapes
        return False
    return together == _generate_sequentially(model, frozenset(), pair, probe)


def _generate_batched(
    model: Any, stops: AbstractSet[int], rows: Sequence[Sequence[int]], sampling: Sampling
) -> list[GeneratedTokens]:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model,
        stop_tokens=[[stop] for stop in stops],
        sampler=make_sampler(sampling),
        logits_processors=make_logits_processors(sampling),
    )
    with closing(generator):
        numbers = generator.insert([list(row) for row in rows], [sampling.max_tokens] * len(rows))
        said = {number: GeneratedTokens([], None) for number in numbers}
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason == "stop":
                    said[response.uid] = said[response.uid]._replace(end=response.token)
                else:
                    said[response.uid].tokens.append(response.token)
    return [said[number] for number in numbers]


def _generate_sequentially(
    model: Any, stops: AbstractSet[int], rows: Sequence[Sequence[int]], sampling: Sampling
) -> list[GeneratedTokens]:
    sampler = make_sampler(sampling)
    return [_generate_one(model, stops, row, sampling, sampler) for row in rows]


def _generate_one(
    model: Any, stops: AbstractSet[int], row: Sequence[int], sampling: Sampling, sampler: Any
) -> GeneratedTokens:
    tokens = stream_tokens(
        model,
        row,
        max_tokens=sampling.max_tokens,
        sampler=sampler,
        processors=make_logits_processors(sampling),
    )
    said: list[int] = []
    with closing(tokens):
        for token in tokens:
            if token in stops:
                return GeneratedTokens(said, token)
            said.append(token)
    return GeneratedTokens(said, None)


class GeneratedText(NamedTuple):
    """What a model said to a conversation."""

    text: str
    is_cut: bool  # it would have gone on


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    thinking: bool | None = None,
) -> list[str]:
    """One answer for each conversation, in order; see `generate_replies`."""
    replies = generate_replies(model, tokenizer, prompts, sampling=sampling, thinking=thinking)
    return [reply.text for reply in replies]


def generate_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    thinking: bool | None = None,
) -> list[GeneratedText]:
    """One answer for each conversation, in order, as `policy.batched` completes them.

    Raises:
        ConfigError: `thinking` is set and the chat template knows no such mode.
        ModelError: the chat template refuses a conversation.
    """
    if thinking is not None:
        check_thinking(tokenizer)
    rows = [encode_prompt(tokenizer, messages, thinking=thinking) for messages in prompts]
    said = generate_tokens(model, tokenizer.eos_token_ids, rows, sampling)
    return [GeneratedText(decode_tokens(tokenizer, one.tokens), one.end is None) for one in said]
