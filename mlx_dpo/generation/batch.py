"""Generate answers to many prompts.

All answers are generated in one batch if the model's batched KV cache gives exact results,
otherwise one after another.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from typing import Any, NamedTuple

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.generation.decode import decode_tokens
from mlx_dpo.generation.prompt import check_thinking, encode_prompt
from mlx_dpo.generation.sampling import (
    Sampler,
    make_logits_processors,
    make_sampler,
    stream_tokens,
)
from mlx_dpo.types import Message

PROBE_PROMPT, PROBE_TOKENS = 64, 16  # tokens of a prompt and of an answer in the exactness test


class GeneratedTokens(NamedTuple):
    """The token ids of one generated answer."""

    tokens: list[int]  # without the stop token
    stop_token: int | None  # None if the answer was truncated


class GeneratedText(NamedTuple):
    """The text of one generated answer."""

    text: str
    is_truncated: bool  # at `max_tokens`


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    thinking: bool | None = None,
) -> list[str]:
    """Generate one answer to each conversation, and return the answers' texts in order.

    Raises:
        ConfigError: `thinking` is set and the chat template has no thinking mode.
        ModelError: the chat template refuses a conversation.
    """
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
    """Generate one answer to each conversation, and return the answers in order.

    Raises:
        ConfigError: `thinking` is set and the chat template has no thinking mode.
        ModelError: the chat template refuses a conversation.
    """
    if thinking is not None:
        check_thinking(tokenizer)
    token_ids = [encode_prompt(tokenizer, messages, thinking=thinking) for messages in prompts]
    answers = generate_tokens(model, tokenizer.eos_token_ids, token_ids, sampling)
    return [
        GeneratedText(decode_tokens(tokenizer, answer.tokens), answer.stop_token is None)
        for answer in answers
    ]


def generate_tokens(
    model: Any,
    stop_tokens: AbstractSet[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[GeneratedTokens]:
    """Generate one answer to each prompt (token ids) and return the answers, in order.

    The answers are generated in one batch if the model's batched KV cache gives exact results,
    otherwise one after another. At temperature 0 an answer does not depend on the other prompts.
    """
    is_batched = len(prompts) > 1 and is_batching_exact(model, prompts)
    generate = _generate_batched if is_batched else _generate_sequentially
    return generate(model, stop_tokens, prompts, sampling)


def is_batching_exact(model: Any, prompts: Sequence[Sequence[int]]) -> bool:
    """Return whether the model generates the same tokens for a batch of prompts as for each alone.

    This is tested with the last tokens of the shortest and of the longest prompt, because batched
    KV caches go wrong where prompts are padded.
    """
    pair = [min(prompts, key=len)[-PROBE_PROMPT:], max(prompts, key=len)[-PROBE_PROMPT:]]
    pair[0] = pair[0][: max(1, len(pair[1]) // 2)]
    sampling = Sampling(max_tokens=PROBE_TOKENS)
    try:
        batched = _generate_batched(model, frozenset(), pair, sampling)
    except ValueError:  # mlx-lm refuses the cache, or MLX the shapes
        return False
    return batched == _generate_sequentially(model, frozenset(), pair, sampling)


def _generate_batched(
    model: Any,
    stop_tokens: AbstractSet[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[GeneratedTokens]:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model,
        stop_tokens=[[stop] for stop in stop_tokens],
        sampler=make_sampler(sampling),
        logits_processors=make_logits_processors(sampling),
    )
    with closing(generator):
        max_tokens = [sampling.max_tokens] * len(prompts)
        uids = generator.insert([list(prompt) for prompt in prompts], max_tokens)
        answers = {uid: GeneratedTokens([], None) for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                answer = answers[response.uid]
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
) -> list[GeneratedTokens]:
    sampler = make_sampler(sampling)
    return [
        _generate_completion(model, stop_tokens, prompt, sampling, sampler) for prompt in prompts
    ]


def _generate_completion(
    model: Any,
    stop_tokens: AbstractSet[int],
    prompt: Sequence[int],
    sampling: Sampling,
    sampler: Sampler,
) -> GeneratedTokens:
    stream = stream_tokens(
        model,
        prompt,
        max_tokens=sampling.max_tokens,
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
