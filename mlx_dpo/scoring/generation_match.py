"""Make sure that log-probs are computed by the same function that generates.

A model generates with KV caches, one token at a time, and is scored in one pass without caches. A
few models of mlx-lm compute different functions in the two ways: gemma3n, for example, shares keys
and values between layers only if there are caches. Training would then change a function that
never generates. Both ways are therefore compared on random tokens. If they differ, but a pass with
new, empty caches agrees with generation, the model is changed so that each pass without caches
uses new ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, make_prompt_cache

from mlx_dpo.adapters.master_weights import cast_for_forward
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.arrays import scalar
from mlx_dpo.scoring.backbone import UnsupportedModelError, split_backbone
from mlx_dpo.scoring.equivalence import (
    SEED,
    UNSUPPORTED_ERRORS,
    max_value_error,
    mode_without_dropout,
    tolerance,
)

PROMPT = 6  # tokens that go through the model in one pass
GENERATED = 6  # tokens that go through it one at a time
MAX_TESTED_WINDOW = 512  # tokens; wider windows run through the same code and are not tested


@dataclass(frozen=True)
class GenerationMatch:
    """How far log-probs as scored differ from log-probs as generated, in nats per token."""

    difference: float  # largest of all tokens
    uncached_difference: float  # the same without KV caches
    uses_caches: bool  # whether passes without caches were changed to use new, empty ones

    def describe(self) -> str:
        """Return a note for the user: how exact the match is, and whether the model was changed."""
        text = f"log-probs match generation (within {self.difference:.0e} nats per token)"
        if self.uses_caches:
            text += (
                ", scored with KV caches, because without them this model's log-probs differ from "
                f"generation by up to {self.uncached_difference:.2g} nats per token"
            )
        return text


class GenerationMismatchError(ModelError):
    """No pass over a whole sequence gives the log-probs of generation."""

    def __init__(self, message: str, uncached_difference: float) -> None:
        super().__init__(message)
        self.uncached_difference = uncached_difference  # nats per token, without KV caches


class NotComparableError(Exception):
    """Error raised if a model cannot run with KV caches, or not in training mode."""


def match_generation(
    model: nn.Module, *, vocab_size: int, max_length: int | None = None
) -> GenerationMatch:
    """Compare the model's log-probs as scored and as generated; make them the same if possible.

    The model is changed (`compute_with_caches`) only if its passes without caches differ from
    generation and those with new, empty caches do not.

    Args:
        max_length: Longest sequence that will be scored. A sliding window at least as long is not
            tested.

    Raises:
        GenerationMismatchError: no pass over a whole sequence agrees with generation.
        NotComparableError: the model cannot run in one of the two ways.
    """
    original = type(model)
    try:
        return _match(model, vocab_size, max_length)
    except UNSUPPORTED_ERRORS as error:
        model.__class__ = original
        raise NotComparableError(reason(error)) from error
    except ModelError:
        model.__class__ = original
        raise


def _match(model: nn.Module, vocab_size: int, max_length: int | None) -> GenerationMatch:
    window = shortest_window(model)
    tests_window = window and (max_length is None or window < max_length)
    prompts = [PROMPT, window + 3] if tests_window else [PROMPT]
    sequences = [_random_tokens(length + GENERATED, vocab_size) for length in prompts]
    with cast_for_forward(model), mode_without_dropout(model, training=False):
        expected = [_generated_logps(model, tokens) for tokens in sequences]
    uncached = _compare(model, sequences, expected)
    if uncached.agree:
        without = getattr(type(model), "_uncached_difference", uncached.nats)
        return GenerationMatch(uncached.nats, without, computes_with_caches(model))
    compute_with_caches(model, uncached.nats)
    cached = _compare(model, sequences, expected)
    if cached.agree:
        return GenerationMatch(cached.nats, uncached.nats, uses_caches=True)
    where, advice = "", "update mlx-lm, or use another model"
    if uncached.first_agrees or cached.first_agrees:
        where = f" longer than its sliding window of {window} tokens"
        advice = f"use --max-length {window}, or update mlx-lm"
    raise GenerationMismatchError(
        f"one pass over a sequence{where} gives log-probs that differ from those of token-by-token "
        f"generation (by up to {min(cached.nats, uncached.nats):.2g} nats per token), so training "
        f"would optimize another function than the one that generates; {advice}",
        uncached.nats,
    )


def use_generating_function(
    model: nn.Module, *, vocab_size: int, max_length: int | None = None
) -> None:
    """Make passes without KV caches compute what the model generates, if the two can be compared.

    Raises:
        ModelError: no pass over a whole sequence agrees with generation.
    """
    with suppress(NotComparableError):
        match_generation(model, vocab_size=vocab_size, max_length=max_length)


def compute_with_caches(model: nn.Module, difference: float = 0.0) -> None:
    """Change the model so that each pass without KV caches uses new, empty ones.

    Args:
        difference: Largest difference from generation before the change, in nats per token; a later
            comparison reports it.
    """
    original: Any = type(model)

    def call(self: Any, tokens: mx.array, cache: Any = None, **more: Any) -> mx.array:
        logits: mx.array = original.__call__(
            self, tokens, cache=empty_caches(self) if cache is None else cache, **more
        )
        return logits

    members = {
        "__call__": call,
        "_computes_with_caches": True,
        "_uncached_difference": difference,
    }
    model.__class__ = type(original.__name__, (original,), members)


def computes_with_caches(model: nn.Module) -> bool:
    """Return whether `compute_with_caches` has changed the model."""
    return getattr(type(model), "_computes_with_caches", False)


def empty_caches(model: nn.Module) -> list[Any]:
    """Return new, empty KV caches for the model, one per layer."""
    # mlx-lm's default KVCache grows by 256 positions at a time; the backward pass would save
    # the zeros as well.
    return [ConcatenateKVCache() if type(c) is KVCache else c for c in make_prompt_cache(model)]


def shortest_window(model: nn.Module) -> int:
    """Return the narrowest attention window of the model's layers, in tokens.

    Windows above MAX_TESTED_WINDOW are ignored; the result is 0 if no window remains.
    """
    return min(_window_sizes(make_prompt_cache(model)), default=0)


def _window_sizes(caches: Iterable[Any]) -> Iterator[int]:
    """Yield the window sizes of the caches and their nested caches, in tokens.

    Windows above MAX_TESTED_WINDOW are left out.
    """
    for cache in caches:
        yield from _window_sizes(getattr(cache, "caches", ()))
        width = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
        if width and width <= MAX_TESTED_WINDOW:
            yield width


def _random_tokens(length: int, vocab_size: int) -> mx.array:
    """Return a sequence of random token ids. (1, length)"""
    ids = np.random.default_rng(SEED).integers(0, vocab_size, length)
    return mx.array(ids.astype(np.int32))[None]


def _generated_logps(model: nn.Module, tokens: mx.array) -> mx.array:
    """Return the log-probs of the last tokens, computed as in generation. (GENERATED,)"""
    caches, start = make_prompt_cache(model), tokens.shape[1] - GENERATED
    logits = []
    for part in (tokens[:, :start], *mx.split(tokens[:, start:-1], GENERATED - 1, axis=1)):
        logits.append(_last_logits(model, part, 1, caches))
        mx.eval(logits[-1])
    return _target_logps(mx.concatenate(logits, axis=1), tokens)


def _scored_logps(model: nn.Module, tokens: mx.array) -> mx.array:
    """Return the log-probs of the last tokens, computed in one pass. (GENERATED,)"""
    return _target_logps(_last_logits(model, tokens[:, :-1], GENERATED), tokens)


def _last_logits(
    model: nn.Module, tokens: mx.array, count: int, caches: Sequence[Any] | None = None
) -> mx.array:
    """Return the logits at the last `count` positions. (1, T) -> (1, count, V)

    The head runs at these positions only, because the logits of a long sequence might not fit into
    memory.
    """
    if tokens.shape[1] <= PROMPT + GENERATED:
        return model(tokens, cache=caches)[:, -count:]
    try:
        parts = split_backbone(model)
        return parts.logits(parts.hidden_states(tokens, caches)[:, -count:])
    except UnsupportedModelError:
        return model(tokens, cache=caches)[:, -count:]


def _target_logps(logits: mx.array, tokens: mx.array) -> mx.array:
    """Return the log-probs of the last tokens. (1, n, V), (1, T) -> (n,)"""
    logits = logits.astype(mx.float32)
    targets = tokens[:, -logits.shape[1] :, None]
    chosen = mx.take_along_axis(logits, targets, axis=-1).squeeze(-1)
    return (chosen - mx.logsumexp(logits, axis=-1))[0]


class _Comparison(NamedTuple):
    """Differences of log-probs as scored and as generated."""

    nats: float  # the largest, per token
    agree: bool  # to the rounding of the model's dtype, in all sequences
    first_agrees: bool  # in the first, short sequence


def _compare(
    model: nn.Module, sequences: Sequence[mx.array], expected: Sequence[mx.array]
) -> _Comparison:
    """Compare log-probs as scored, in training mode, with log-probs as generated."""
    with cast_for_forward(model), mode_without_dropout(model, training=True):
        scored = [_scored_logps(model, tokens) for tokens in sequences]
        mx.eval(scored)
    limit = tolerance(model).values
    pairs = list(zip(scored, expected, strict=True))
    nats = max(scalar(mx.abs(s - e).max()) for s, e in pairs)
    agree = [max_value_error(s[None], e[None]) <= limit for s, e in pairs]  # no for NaN
    return _Comparison(nats, all(agree), agree[0])
