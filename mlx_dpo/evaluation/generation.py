"""Answers to many prompts at once."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from itertools import takewhile
from typing import Any

from mlx_dpo.policy.generation import (
    check_thinking,
    make_processors,
    make_sampler,
    prompt_tokens,
    stream_tokens,
    text_of,
)
from mlx_dpo.policy.sampling import Sampling
from mlx_dpo.types import Message

PROBE_PROMPT, PROBE_TOKENS = 64, 16


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    thinking: bool | None = None,
) -> list[str]:
    """One answer for each conversation, in order.

    With `temperature` 0 these are the answers that each would get alone. They are computed
    together where the architecture's batched cache is exact, else one after another.

    Raises:
        ConfigError: `thinking` is set and the chat template knows no such mode.
        ModelError: the chat template refuses a conversation.
    """
    if thinking is not None:
        check_thinking(tokenizer)
    rows = [prompt_tokens(tokenizer, messages, thinking=thinking) for messages in prompts]
    batched = len(rows) > 1 and batches_exactly(model, rows)
    complete = _together if batched else _one_by_one
    stops = tokenizer.eos_token_ids
    return [text_of(tokenizer, tokens) for tokens in complete(model, stops, rows, sampling)]


def batches_exactly(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Whether this architecture's batched cache gives the tokens that single prompts give.

    Tried on the shortest and the longest prompt: padding is where such caches go wrong.
    """
    pair = [min(rows, key=len)[-PROBE_PROMPT:], max(rows, key=len)[-PROBE_PROMPT:]]
    pair[0] = pair[0][: max(1, len(pair[1]) // 2)]
    probe = Sampling(max_tokens=PROBE_TOKENS)
    try:
        together = _together(model, frozenset(), pair, probe)
    except ValueError:  # mlx-lm's word for a cache that cannot be batched, MLX's for shapes
        return False
    return together == _one_by_one(model, frozenset(), pair, probe)


def _together(
    model: Any, stops: AbstractSet[int], rows: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """Completions without their end tokens, one for each row."""
    from mlx_lm.generate import BatchGenerator

    answers: dict[int, list[int]] = {}
    generator = BatchGenerator(
        model,
        stop_tokens=[[stop] for stop in stops],
        sampler=make_sampler(sampling),
        logits_processors=make_processors(sampling),
    )
    with closing(generator):
        numbers = generator.insert([list(row) for row in rows], [sampling.max_tokens] * len(rows))
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason != "stop":
                    answers.setdefault(response.uid, []).append(response.token)
    return [answers.get(number, []) for number in numbers]


def _one_by_one(
    model: Any, stops: AbstractSet[int], rows: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """Completions without their end tokens, one for each row."""
    sampler = make_sampler(sampling)
    answers = []
    for row in rows:
        tokens = stream_tokens(
            model,
            row,
            max_tokens=sampling.max_tokens,
            sampler=sampler,
            processors=make_processors(sampling),
        )
        with closing(tokens):
            answers.append(list(takewhile(lambda token: token not in stops, tokens)))
    return answers
