"""Generate answers to many prompts.

All answers are generated in one batch if the model's batched KV cache gives exact results,
otherwise one after another.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from typing import Any, NamedTuple

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.generation.context import FinishReason, max_answer_tokens
from mlx_dpo.generation.decode import decode_tokens
from mlx_dpo.generation.prompt import check_thinking, encode_prompt
from mlx_dpo.generation.sampling import (
    Sampler,
    make_logits_processors,
    make_sampler,
    stream_tokens,
)
from mlx_dpo.phases import Advance, phase
from mlx_dpo.types import Message

PROBE_PROMPT, PROBE_TOKENS = 64, 16  # tokens of a prompt and of an answer in the exactness test


class GeneratedTokens(NamedTuple):
    """The token ids of one generated answer."""

    tokens: list[int]  # without the stop token
    stop_token: int | None  # None if the answer was truncated
    limit: FinishReason = "length"  # what truncated the answer, if it was: `max_tokens` or context

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ends."""
        return self.limit if self.stop_token is None else "stop"


class GeneratedText(NamedTuple):
    """One generated answer, as text and as tokens."""

    text: str
    answer: GeneratedTokens

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ends."""
        return self.answer.finish_reason

    @property
    def is_truncated(self) -> bool:
        """Whether the answer was cut at `max_tokens` or at the end of the context."""
        return self.finish_reason != "stop"


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    context: int | None,
    thinking: bool | None = None,
) -> list[str]:
    """Generate one answer to each conversation, and return the answers' texts in order.

    An answer ends at the end of the model's context, which has `context` tokens (None: no end).

    Raises:
        ConfigError: `thinking` is set and the chat template has no thinking mode, or a conversation
            leaves no room in the context.
        ModelError: the chat template refuses a conversation.
    """
    replies = generate_replies(
        model, tokenizer, prompts, sampling=sampling, context=context, thinking=thinking
    )
    return [reply.text for reply in replies]


def generate_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    context: int | None,
    thinking: bool | None = None,
    name: str = "prompt",
) -> list[GeneratedText]:
    """Generate one answer to each conversation, and return the answers in order.

    An answer ends at the end of the model's context, which has `context` tokens (None: no end).
    Errors call a conversation by `name` and its number.

    Raises:
        ConfigError: `thinking` is set and the chat template has no thinking mode, or a conversation
            leaves no room in the context.
        ModelError: the chat template refuses a conversation.
    """
    if thinking is not None:
        check_thinking(tokenizer)
    token_ids = [encode_prompt(tokenizer, messages, thinking=thinking) for messages in prompts]
    return decode_answers(
        tokenizer,
        generate_tokens(
            model, tokenizer.eos_token_ids, token_ids, sampling, context=context, name=name
        ),
    )


def decode_answers(tokenizer: Any, answers: Sequence[GeneratedTokens]) -> list[GeneratedText]:
    """Return the texts of generated answers."""
    return [GeneratedText(decode_tokens(tokenizer, answer.tokens), answer) for answer in answers]


def generate_tokens(
    model: Any,
    stop_tokens: AbstractSet[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    context: int | None,
    name: str = "prompt",
    is_batched: bool | None = None,
) -> list[GeneratedTokens]:
    """Generate one answer to each prompt (token ids) and return the answers, in order.

    The answers are generated in one batch if the model's batched KV cache gives exact results,
    otherwise one after another. At temperature 0 an answer does not depend on the other prompts.

    Args:
        context: Context length of the model in tokens, where every answer ends; None for no end.
        name: What errors call a prompt, before its number.
        is_batched: Whether to generate all answers in one batch; None decides it by a test.

    Raises:
        ConfigError: a prompt leaves no room in the context.
    """
    lengths = [
        max_answer_tokens(f"{name} {number}", len(prompt), sampling.max_tokens, context)
        for number, prompt in enumerate(prompts, start=1)
    ]
    if is_batched is None:
        is_batched = len(prompts) > 1 and is_batching_exact(model, prompts, context=context)
    generate = _generate_batched if is_batched else _generate_sequentially
    with phase("Generating", len(prompts), unit="answers") as advance:
        answers = generate(model, stop_tokens, prompts, sampling, lengths, advance)
    return [
        answer._replace(limit="length" if length == sampling.max_tokens else "context")
        for answer, length in zip(answers, lengths, strict=True)
    ]


def is_batching_exact(model: Any, prompts: Sequence[Sequence[int]], *, context: int | None) -> bool:
    """Return whether the model generates the same tokens for a batch of prompts as for each alone.

    This is tested with the last tokens of the shortest and of the longest prompt, because batched
    KV caches go wrong where prompts are padded. Without room for the test in the context, the
    result is False.
    """
    room = PROBE_PROMPT if context is None else min(PROBE_PROMPT, context - PROBE_TOKENS)
    if room < 1:
        return False
    pair = [min(prompts, key=len)[-room:], max(prompts, key=len)[-room:]]
    pair[0] = pair[0][: max(1, len(pair[1]) // 2)]
    sampling, lengths = Sampling(max_tokens=PROBE_TOKENS), [PROBE_TOKENS] * 2
    try:
        batched = _generate_batched(model, frozenset(), pair, sampling, lengths)
    except (ValueError, TypeError):  # mlx-lm or the model refuses the cache, or MLX the shapes
        return False
    return batched == _generate_sequentially(model, frozenset(), pair, sampling, lengths)


def _generate_batched(
    model: Any,
    stop_tokens: AbstractSet[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    lengths: Sequence[int],
    advance: Advance = lambda count: None,
) -> list[GeneratedTokens]:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model,
        stop_tokens=[[stop] for stop in stop_tokens],
        sampler=make_sampler(sampling),
        logits_processors=make_logits_processors(sampling),
    )
    with closing(generator):
        uids = generator.insert([list(prompt) for prompt in prompts], list(lengths))
        answers = {uid: GeneratedTokens([], None) for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                answer = answers[response.uid]
                advance(response.finish_reason is not None)
                if response.finish_reason == "stop":
                    answers[response.uid] = answer._replace(stop_token=response.token)
                else:
                    answer.tokens.append(response.token)
    return [answers[uid] for uid in uids]


def _generate_sequentially(
    model: Any,
    stop_tokens: AbstractSet[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    lengths: Sequence[int],
    advance: Advance = lambda count: None,
) -> list[GeneratedTokens]:
    sampler, answers = make_sampler(sampling), []
    for prompt, length in zip(prompts, lengths, strict=True):
        answers.append(_generate_completion(model, stop_tokens, prompt, sampling, sampler, length))
        advance(1)
    return answers


def _generate_completion(
    model: Any,
    stop_tokens: AbstractSet[int],
    prompt: Sequence[int],
    sampling: Sampling,
    sampler: Sampler,
    max_tokens: int,
) -> GeneratedTokens:
    stream = stream_tokens(
        model,
        prompt,
        max_tokens=max_tokens,
        sampler=sampler,
        processors=make_logits_processors(sampling),
    )
    tokens: list[int] = []
    with closing(stream):
        for token in stream:
            if token in stop_tokens:
                return GeneratedTokens(tokens, token)
            tokens.append(token)
    return GeneratedTokens(tokens, None)
