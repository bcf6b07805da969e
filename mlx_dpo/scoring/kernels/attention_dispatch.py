"""Replace `mx.fast.scaled_dot_product_attention` temporarily, to compute attention in chunks.

mlx-lm's models look up this function at each call, so replacing it in `mx.fast` reaches all models
without code per model. Models that implement attention themselves are not affected.

Shape letters: those of `attention`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_dpo.models.device import is_cpu
from mlx_dpo.models.restore import patched
from mlx_dpo.scoring.kernels.attention import (
    Attention,
    AttentionInputs,
    AttentionOptions,
    QueryChunk,
    chunked_attention,
)

CPU_QUERIES = 64  # of a chunk; measured: scores of larger chunks do not fit into the CPU's caches

# Queries of a chunk on a GPU if all heads together are GPU_WIDTH wide (H D). Calculated, not
# measured: a chunk of a layer starts about 15 kernels (2.5 us each, mlx#4521) and its graph takes
# about 80 us to build. In this time a GPU of 10 TFLOP/s computes about C^2 / 2 scores for C = 512.
GPU_QUERIES, GPU_WIDTH = 512, 576
MAX_SCORE_BYTES = 128 * 2**20  # for the scores of a chunk on a GPU, B H C S float32 numbers
QUERIES_STEP = 64  # on a GPU, a chunk has a multiple of so many queries

MIN_SCORES = 64 * 64  # T_q T_k; below, MLX's own is as fast and saves little memory
FUNCTION_NAME = "scaled_dot_product_attention"

ChunkSize = Callable[[mx.array, mx.array], int]  # queries and keys to the queries of a chunk


class StructuredMask(ABC):
    """An attention mask given by the ranges of keys that each chunk of queries sees.

    A model passes this object to the attention function instead of a mask array.
    """

    __slots__ = ()

    @abstractmethod
    def chunks(self, size: int, dtype: mx.Dtype) -> Sequence[QueryChunk]:
        """Return chunks of at most `size` queries each, which cover all queries in order."""


def queries_per_chunk(queries: mx.array, keys: mx.array) -> int:
    """Return the maximum number of queries in a chunk, by device and shape.

    On a GPU, C queries per chunk let a causal row of T tokens compute T C / 2 scores more than it
    needs, each in a time proportional to H D, and start T / C chunks. The sum is least for a C
    proportional to 1 / sqrt(H D). Chunks are smaller where their scores, B H C S float32 numbers,
    would take more than MAX_SCORE_BYTES, but never smaller than QUERIES_STEP.

    Args:
        queries: (B, H, T_q, D).
        keys: (B, K, T_k, D).
    """
    if is_cpu():
        return CPU_QUERIES
    batch, heads, _, width = queries.shape
    fastest = GPU_QUERIES * math.sqrt(GPU_WIDTH / (heads * width))
    row_bytes = batch * heads * keys.shape[2] * mx.float32.size  # scores of one query
    steps = int(min(fastest, MAX_SCORE_BYTES / row_bytes) / QUERIES_STEP)
    return max(1, steps) * QUERIES_STEP


@contextmanager
def use_chunked_attention(size: int | None = None) -> Iterator[None]:
    """Compute attention in chunks of at most `size` queries inside the block.

    Without `size`, `queries_per_chunk` decides. Use this block for passes with gradients. On Metal,
    passes without gradients are faster outside the block, where MLX's fused kernel takes all
    queries at once. Single queries, small score matrices, and calls with `force_fused` or a stream
    go to MLX unchanged. Blocks may be nested; the innermost one counts. All threads are affected.
    """
    current: Any = mx.fast.scaled_dot_product_attention
    # An inner block must not cut the chunks of the outer one into chunks again.
    fused = current.args[0] if _is_replacement(current) else current
    chunk_size = queries_per_chunk if size is None else lambda queries, keys: size
    with patched(mx.fast, FUNCTION_NAME, partial(_attention, fused, chunk_size)):
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
    chunk_size: ChunkSize | None,
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
        chunk_size: maximum number of queries in a chunk, by queries and keys. If None, only calls
            with a structured mask are computed here, in chunks of `queries_per_chunk`.
    """
    if isinstance(mask, StructuredMask):
        chunks = mask.chunks((chunk_size or queries_per_chunk)(q, k), q.dtype)
        options = AttentionOptions(fused, more["scale"], chunks)
        return chunked_attention(AttentionInputs(q, k, v, None, sinks), options)
    if (
        chunk_size is None
        or more.keys() != {"scale"}
        or not _is_worth_chunking(q.shape[2], k.shape[2], mask)
    ):
        return fused(q, k, v, mask=mask, sinks=sinks, **more)
    array = mask if isinstance(mask, mx.array) else None
    if array is not None:
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    is_causal = mask == "causal"
    size = chunk_size(q, k)
    if not is_cpu():  # chunks of equal size: a small last chunk starts as many kernels
        size = -(-q.shape[2] // -(-q.shape[2] // size))
    chunks = list(_query_chunks(q.shape[2], k.shape[2], size, is_causal=is_causal))
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
