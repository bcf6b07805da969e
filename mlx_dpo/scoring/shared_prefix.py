"""Each prompt once: its caches are forked, and both completions continue from them.

Row i of what comes out predicts token i of a completion: the last token of the prompt
predicts the first, and the last token of the completion, which predicts nothing, stays out.
"""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, make_prompt_cache

from mlx_dpo.data.batching import MIN_CONTINUATION, padded_width
from mlx_dpo.scoring.backbone import ModelParts
from mlx_dpo.types import TokenizedPair

Tokens = Sequence[int]


def completion_hidden_states(
    model: nn.Module, halves: ModelParts, pairs: Sequence[TokenizedPair]
) -> mx.array:
    """Hidden states that predict every token of every completion. (n, D)

    Rows: those of all chosen completions in the order of `pairs`, then of all rejected ones.
    Gradients flow through the prompts. Prompts of one length need no mask; uneven ones go
    through mlx-lm's batched caches, which are exact for some models only.
    """
    prompts = [pair.prompt for pair in pairs]
    lengths = [len(prompt) for prompt in prompts]
    even = len(set(lengths)) == 1
    width = max(lengths) if even else padded_width(max(lengths))
    caches = _empty_caches(model) if even else _empty_batched_caches(model, lengths, width)
    hidden = halves.hidden(right_padded(prompts, width), caches)
    last = hidden[:, -1:]
    if not even:
        for cache in caches:
            cache.finalize()
        last = mx.take_along_axis(hidden, mx.array(lengths)[:, None, None] - 1, axis=1)
    sides = ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    return mx.concatenate(
        [_continue_from_caches(halves, last, caches, side, even=even) for side in sides]
    )


def _continue_from_caches(
    halves: ModelParts,
    last: mx.array,
    caches: list[Any],
    completions: Sequence[Tokens],
    *,
    even: bool,
) -> mx.array:
    """Rows that predict `completions`, after `last` (B, 1, D) and its caches. (n, D)"""
    hidden = last
    longest = max(len(completion) for completion in completions) - 1
    if longest:
        # mlx-lm takes a single token after a cache for generation, where some models switch
        # to kernels that have no gradient.
        needed = max(longest, MIN_CONTINUATION)
        width = needed if even else padded_width(needed)
        tokens = right_padded([c[:-1] for c in completions], width)
        # Copied, for mlx-lm writes into its caches: a second use would see the first.
        hidden = mx.concatenate([last, halves.hidden(tokens, copy.deepcopy(caches))], axis=1)
    width = hidden.shape[1]
    if all(len(completion) == width for completion in completions):
        return hidden.flatten(0, 1)
    kept = [row * width + i for row, c in enumerate(completions) for i in range(len(c))]
    return hidden.flatten(0, 1)[mx.array(kept)]


def right_padded(rows: Sequence[Tokens], width: int) -> mx.array:
    """Token ids, with zeros where a row is shorter. (B, width) int32"""
    tokens = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return mx.array(tokens)


def _empty_caches(model: nn.Module) -> list[Any]:
    """Empty caches, one for each layer."""
    # The plain one grows by 256 positions at a time and keeps as many zeros for the gradient.
    return [ConcatenateKVCache() if type(c) is KVCache else c for c in make_prompt_cache(model)]


def _empty_batched_caches(model: nn.Module, lengths: Sequence[int], width: int) -> list[Any]:
    """Empty caches for rows of these lengths that are padded on the right."""
    single = [make_prompt_cache(model) for _ in lengths]
    caches = [type(layer[0]).merge(list(layer)) for layer in zip(*single, strict=True)]
    padding = [width - length for length in lengths]
    for cache in caches:
        cache.prepare(lengths=list(lengths), right_padding=padding)
    return caches
