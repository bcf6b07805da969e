"""Hidden states of completions whose pair shares a prompt prefix: each prompt runs only once.

The prompt's KV caches are copied, and the chosen and the rejected completion continue from the
copies. The last prompt token predicts the first token of a completion. The last token of a
completion is left out, because no token follows it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_dpo.data.batches.padding import MIN_CONTINUATION, padded_width
from mlx_dpo.scoring.backbone import ModelParts
from mlx_dpo.scoring.generation_match import empty_caches
from mlx_dpo.types import TokenizedPair, lack_rejected

Tokens = Sequence[int]


def completion_hidden_states(
    model: nn.Module, parts: ModelParts, pairs: Sequence[TokenizedPair]
) -> mx.array:
    """Return the hidden states that predict the tokens of all completions. (n, D)

    The rows are in the order of `pairs`: first all chosen completions, then all rejected ones.
    The result can be differentiated; gradients include the contribution of the prompts. Prompts of
    different lengths use mlx-lm's batched caches, which are exact for some models only.
    """
    prompts = [pair.prompt for pair in pairs]
    lengths = [len(prompt) for prompt in prompts]
    is_even = len(set(lengths)) == 1
    width = max(lengths) if is_even else padded_width(max(lengths))
    caches = empty_caches(model) if is_even else _empty_batched_caches(model, lengths, width)
    hidden = parts.hidden_states(right_padded(prompts, width), caches)  # (B, width, D)
    last = hidden[:, -1:]  # (B, 1, D)
    if not is_even:
        for cache in caches:
            cache.finalize()
        last = mx.take_along_axis(hidden, mx.array(lengths)[:, None, None] - 1, axis=1)
    texts = [([pair.chosen for pair in pairs], [pair.scored for pair in pairs])]
    if not lack_rejected(pairs):
        rejected = [pair.rejected for pair in pairs]
        texts.append((rejected, [list(range(len(ids))) for ids in rejected]))
    return mx.concatenate(
        [
            _continue_from_caches(parts, last, caches, completions, scored, is_even=is_even)
            for completions, scored in texts
        ]
    )


def _continue_from_caches(
    parts: ModelParts,
    last: mx.array,
    caches: list[Any],
    completions: Sequence[Tokens],
    scored: Sequence[Sequence[int]],
    *,
    is_even: bool,
) -> mx.array:
    """Return the hidden states that predict the scored tokens of `completions`. (n, D)

    Args:
        last: hidden states of the last prompt tokens, (B, 1, D).
        caches: KV caches of the prompts; they are copied, not changed.
        scored: positions of the scored tokens in each completion.
        is_even: whether all prompts have the same length.
    """
    hidden = last
    longest = max(len(completion) for completion in completions) - 1
    if longest:
        # mlx-lm treats a single token after a cache as generation, for which some models use
        # kernels without a gradient.
        needed = max(longest, MIN_CONTINUATION)
        width = needed if is_even else padded_width(needed)
        tokens = right_padded([c[:-1] for c in completions], width)
        # Copies, because mlx-lm writes into caches: a second use would see the first one's tokens.
        continued = parts.hidden_states(tokens, copy.deepcopy(caches))
        hidden = mx.concatenate([last, continued], axis=1)
    width = hidden.shape[1]
    if all(len(places) == width for places in scored):
        return hidden.flatten(0, 1)
    # Padding and tokens that are not scored are dropped by a gather from the flat (B width, D).
    rows = [row * width + i for row, places in enumerate(scored) for i in places]
    return hidden.flatten(0, 1)[mx.array(rows)]


def right_padded(rows: Sequence[Tokens], width: int) -> mx.array:
    """Return the token ids of `rows`, padded with zeros on the right. (B, width) int32"""
    tokens = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return mx.array(tokens)


def _empty_batched_caches(model: nn.Module, lengths: Sequence[int], width: int) -> list[Any]:
    """Return empty batched KV caches, one per layer, for right-padded prompts.

    Args:
        lengths: number of tokens of each prompt.
        width: number of tokens to which the prompts are padded.
    """
    row_caches = [make_prompt_cache(model) for _ in lengths]
    caches = [type(layer[0]).merge(list(layer)) for layer in zip(*row_caches, strict=True)]
    padding = [width - length for length in lengths]
    for cache in caches:
        cache.prepare(lengths=list(lengths), right_padding=padding)
    return caches
