"""Sample tokens from a model: the sampler, the repetition penalty, and a stream of tokens.

mlx-lm is imported inside the functions because the import takes seconds.
"""

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, redirect_stdout
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_dpo.config.sampling import Sampling

PENALTY_WINDOW = 20  # tokens; mlx-lm's default

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def make_sampler(sampling: Sampling) -> Sampler:
    """Return a function that samples tokens (B,) from log-probabilities (B, V).

    The samples depend on the seed only: MLX's global random state is neither read nor changed.
    """
    from mlx_lm import sample_utils

    if sampling.temperature == 0:
        return sample_utils.greedy_sampler
    filters: list[Sampler] = []
    if sampling.top_p < 1:
        filters.append(partial(sample_utils.apply_top_p, top_p=sampling.top_p))
    if sampling.min_p > 0:
        filters.append(partial(sample_utils.apply_min_p, min_p=sampling.min_p))
    if sampling.top_k > 0:
        filters.append(partial(sample_utils.apply_top_k, top_k=sampling.top_k))
    key = mx.random.key(sampling.with_seed().seed or 0)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        for apply_filter in filters:
            logprobs = apply_filter(logprobs)
        key, subkey = mx.random.split(key)
        return mx.random.categorical(logprobs / sampling.temperature, key=subkey)

    return sample


def make_logits_processors(
    sampling: Sampling, cached_tokens: Sequence[int] = ()
) -> list[LogitsProcessor]:
    """Return functions that change logits (B, V) before sampling: the repetition penalty, if set.

    Args:
        cached_tokens: Prompt tokens that mlx-lm does not see because they are in the KV cache.
    """
    from mlx_lm import sample_utils

    if sampling.repetition_penalty == 1:
        return []
    cached = mx.array(list(cached_tokens)[-PENALTY_WINDOW:], mx.uint32)
    [penalize] = sample_utils.make_logits_processors(
        repetition_penalty=sampling.repetition_penalty, repetition_context_size=PENALTY_WINDOW
    )
    return [lambda tokens, logits: penalize(mx.concatenate([cached, mx.array(tokens)]), logits)]


def stream_tokens(
    model: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler,
    processors: list[LogitsProcessor],
    cache: list[Any] | None = None,
) -> Generator[int]:
    """Yield the generated token ids one after another, end tokens included.

    When a token is yielded, the KV cache `cache` already contains this token.
    """
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
