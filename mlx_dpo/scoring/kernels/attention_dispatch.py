"""Replace `mx.fast.scaled_dot_product_attention` temporarily, to compute attention in chunks.

mlx-lm's models look up this function at each call, so replacing it in `mx.fast` reaches all models
without code per model. Models that implement attention themselves are not affected.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_dpo.models.restore import patched
from mlx_dpo.scoring.kernels.attention import (
    Attention,
    AttentionInputs,
    AttentionOptions,
    QueryChunk,
    chunked_attention,
)

QUERIES_PER_CHUNK = 64  # measured on the CPU: scores of larger chunks do not fit into its caches
MIN_SCORES = 64 * 64  # T_q T_k; below, MLX's own is as fast and saves little memory
FUNCTION_NAME = "scaled_dot_product_attention"


class StructuredMask(ABC):
    """An attention mask given by the ranges of keys that each chunk of queries sees.

    A model passes this object to the attention function instead of a mask array.
    """

    __slots__ = ()

    @abstractmethod
    def chunks(self, size: int, dtype: mx.Dtype) -> Sequence[QueryChunk]:
        """Return chunks of at most `size` queries each, which cover all queries in order."""


@contextmanager
def use_chunked_attention(queries_per_chunk: int = QUERIES_PER_CHUNK) -> Iterator[None]:
    """Compute attention in chunks of queries inside the block.

    Use this block for passes with gradients. On Metal, passes without gradients are faster outside
    the block, where MLX's fused kernel takes all queries at once. Single queries, small score
    matrices, and calls with `force_fused` or a stream go to MLX unchanged. Blocks may be nested;
    the innermost one counts. All threads are affected.
    """
    current: Any = mx.fast.scaled_dot_product_attention
    # An inner block must not cut the chunks of the outer one into chunks again.
    fused = current.args[0] if _is_replacement(current) else current
    with patched(mx.fast, FUNCTION_NAME, partial(_attention, fused, queries_per_chunk)):
        yield


@contextmanager
def use_structured_masks() -> Iterator[None]:
    """Make `mx.fast.scaled_dot_product_attention` accept a `StructuredMask` inside the block."""
    current: Any = mx.fast.scaled_dot_product_attention
    if _is_replacement(current):
        yield
        return
    with patched(mx.fast, FUNCTION_NAME, partial(_attention, current, None)):
        yield


def _is_replacement(function: Any) -> bool:
    """Return whether `function` is the replacement that this module installs."""
    return isinstance(function, partial) and function.func is _attention


def _attention(
    fused: Attention,
    queries_per_chunk: int | None,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: str | mx.array | StructuredMask | None = None,
    sinks: mx.array | None = None,
    **more: Any,
) -> mx.array:
    """Return the attention output, computed in chunks if worthwhile. (B, H, T_q, E)

    Arguments not listed are those of `mx.fast.scaled_dot_product_attention`.

    Args:
        fused: MLX's own attention function.
        queries_per_chunk: maximum number of queries in a chunk. If None, only calls with a
            structured mask are computed here, in a single chunk.
    """
    if isinstance(mask, StructuredMask):
        chunks = mask.chunks(queries_per_chunk or q.shape[2], q.dtype)
        options = AttentionOptions(fused, more["scale"], chunks)
        return chunked_attention(AttentionInputs(q, k, v, None, sinks), options)
    if (
        queries_per_chunk is None
        or more.keys() != {"scale"}
        or not _is_worth_chunking(q.shape[2], k.shape[2], mask)
    ):
        return fused(q, k, v, mask=mask, sinks=sinks, **more)
    array = mask if isinstance(mask, mx.array) else None
    if array is not None:
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    is_causal = mask == "causal"
    chunks = list(_query_chunks(q.shape[2], k.shape[2], queries_per_chunk, is_causal=is_causal))
    options = AttentionOptions(fused, more["scale"], chunks)
    return chunked_attention(AttentionInputs(q, k, v, array, sinks), options)


def _is_worth_chunking(queries: int, keys: int, mask: str | mx.array | None) -> bool:
    """Return whether attention in chunks supports this `mask` and saves memory or time."""
    if queries == 1 or queries * keys < MIN_SCORES:
        return False
    return not isinstance(mask, str) or (mask == "causal" and queries <= keys)


def _query_chunks(queries: int, keys: int, size: int, *, is_causal: bool) -> Iterator[QueryChunk]:
    """Yield chunks of `size` queries, each with the range of keys that its queries see.

    With a causal mask, the keys of a chunk end at its last query, so about half of the attention
    scores are never computed.
    """
    for start in range(0, queries, size):
        end = min(start + size, queries)
        # The last query sees the last key, also if there are more keys than queries.
        seen = keys - queries + end if is_causal else keys
        yield QueryChunk(start, end, ((0, seen),), is_causal=is_causal)
