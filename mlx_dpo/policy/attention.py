"""Attention that never keeps a T×T array: MLX's own, in chunks of queries.

MLX keeps the probabilities of every head and layer for the backward pass. Inside the blocks
here its fused attention computes them again, chunk by chunk, by `policy.chunks`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_dpo.policy.chunks import Attention, Chunk, Inputs, Rule, attend_in_chunks

QUERIES_PER_CHUNK = 64  # measured on the CPU: larger chunks leave its caches
FEWEST_SCORES = 64 * 64  # T_q T_k; below, MLX's own is as fast and what it keeps is small


class Mask(ABC):
    """A mask that is known by its structure, not as an array: which keys each chunk may see."""

    __slots__ = ()

    @abstractmethod
    def chunks(self, size: int, dtype: mx.Dtype) -> Sequence[Chunk]:
        """Chunks of at most `size` queries that cover all queries in order."""


@contextmanager
def chunked_attention(queries_per_chunk: int = QUERIES_PER_CHUNK) -> Iterator[None]:
    """Inside the block MLX's fused attention is computed in chunks of queries.

    Models of mlx-lm call it by attribute and see the change; those that write out their
    softmax do not. From inside it cannot be seen whether gradients will be asked for, so the
    block is the statement that they are: on Metal, passes without gradients belong outside,
    where MLX's fused kernel takes the whole length at once. Single queries, few scores, and
    calls that ask for `force_fused` or a stream go to MLX unchanged. Blocks nest; the
    innermost counts. The change is seen by every thread.
    """
    before: Any = mx.fast.scaled_dot_product_attention
    plain = before.args[0] if _is_ours(before) else before
    mx.fast.scaled_dot_product_attention = partial(_attention, plain, queries_per_chunk)
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = before


@contextmanager
def structured_attention() -> Iterator[None]:
    """Inside the block MLX's fused attention takes a `Mask`, and all else as it would before."""
    before: Any = mx.fast.scaled_dot_product_attention
    if _is_ours(before):
        yield
        return
    mx.fast.scaled_dot_product_attention = partial(_attention, before, None)
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = before


def _is_ours(function: Any) -> bool:
    return isinstance(function, partial) and function.func is _attention


def _attention(
    plain: Attention,
    queries_per_chunk: int | None,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: str | mx.array | Mask | None = None,
    sinks: mx.array | None = None,
    **more: Any,
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention`. (B, H, T_q, E)"""
    if isinstance(mask, Mask):
        chunks = mask.chunks(queries_per_chunk or q.shape[2], q.dtype)
        return attend_in_chunks(
            Inputs(q, k, v, None, sinks), Rule(plain, more["scale"], False, chunks)
        )
    if (
        queries_per_chunk is None
        or more.keys() != {"scale"}
        or not _worth_chunks(q.shape[2], k.shape[2], mask)
    ):
        return plain(q, k, v, mask=mask, sinks=sinks, **more)
    array = mask if isinstance(mask, mx.array) else None
    if array is not None:
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    chunks = list(_chunks(q.shape[2], k.shape[2], queries_per_chunk, causal=mask == "causal"))
    rule = Rule(plain, more["scale"], mask == "causal", chunks)
    return attend_in_chunks(Inputs(q, k, v, array, sinks), rule)


def _worth_chunks(length: int, seen: int, mask: str | mx.array | None) -> bool:
    if length == 1 or length * seen < FEWEST_SCORES:
        return False
    return not isinstance(mask, str) or (mask == "causal" and length <= seen)


def _chunks(length: int, seen: int, size: int, *, causal: bool) -> Iterator[Chunk]:
    for start in range(0, length, size):
        end = min(start + size, length)
        # The last query sees the last key, also where there are more keys than queries.
        yield Chunk(start, end, 0, seen - length + end if causal else seen)
