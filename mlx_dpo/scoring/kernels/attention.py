"""Attention that never keeps a T×T array: MLX's own, in chunks of queries.

MLX keeps the probabilities of every head and layer for the backward pass. Inside the blocks
here its fused attention computes them again, chunk by chunk, by `policy.chunks`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlx_dpo.models.device import on_cpu


def causal_mask(length: int, seen: int, dtype: mx.Dtype) -> mx.array:
    """To be added to scores; only the last corner hides anything. (C, S)"""
    corner = mx.triu(mx.full((length, length), -mx.inf, dtype), k=1)
    return mx.pad(corner, [(0, 0), (seen - length, 0)])


def additive_mask(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """A mask as something to add to scores. Shape of the mask"""
    if mask.dtype != mx.bool_:
        return mask
    # A product, because `where` is slow on the CPU. Half of the lowest number, so that a score
    # added to it does not overflow, and a row that sees nothing stays finite.
    return (1 - mask.astype(dtype)) * (mx.finfo(dtype).min / 2)


def softmax(scores: mx.array) -> mx.array:
    """Over the last axis, in float32 at least. Shape and type of the scores"""
    if not on_cpu() or scores.dtype == mx.float64:
        return mx.softmax(scores, axis=-1, precise=True)
    x = scores.astype(mx.float32)
    weights = exp(x - x.max(axis=-1, keepdims=True))
    return (weights * (1 / weights.sum(axis=-1, keepdims=True))).astype(scores.dtype)


def exp(x: mx.array) -> mx.array:
    """e^x. Shape of x, float32"""
    return mx.power(math.e, x)


# Keys a query sees, on average, up to which the CPU keeps its probabilities: few bytes beside
# what a block keeps anyway, and a third of attention's time.
MAX_SAVED_KEYS = 256

Attention = Callable[..., mx.array]
Probabilities = tuple[mx.array, mx.array | None]  # (B, H, C, S), and of sinks (B, H, C, 1)


class AttentionInputs(NamedTuple):
    """What attention is given, a chunk of it, or the gradients towards it."""

    queries: mx.array  # (B, H, T_q, D)
    keys: mx.array  # (B, K, T_k, D), H a multiple of K
    values: mx.array  # (B, K, T_k, E)
    mask: mx.array | None  # bool, or added to the scores; broadcasts to (B, H, T_q, T_k)
    sinks: mx.array | None  # (H,) scores of a key without a value


class QueryChunk(NamedTuple):
    """Queries `start` to `end` see keys `first` to `seen`, but for what `hidden` hides."""

    start: int
    end: int
    first: int
    seen: int
    hidden: mx.array | None = None  # (C, S), added to the scores


class AttentionOptions(NamedTuple):
    """What is the same for every chunk."""

    plain: Attention
    scale: float
    causal: bool
    chunks: Sequence[QueryChunk]


def chunked_attention(inputs: AttentionInputs, rule: AttentionOptions) -> mx.array:
    """Attention of which only inputs and output are kept. (B, H, T_q, E)

    A captured array gets no gradient, so everything that may want one is an argument.
    """
    names = [
        name
        for name, value in inputs._asdict().items()
        if value is not None and mx.issubdtype(value.dtype, mx.floating)
    ]

    kept = _saved_probabilities(inputs, rule)

    @mx.custom_function
    def attend(*arrays: mx.array) -> mx.array:
        given = dict(zip(names, arrays, strict=False))  # what is kept comes behind them
        return _forward(inputs._replace(**given), rule, arrays[len(names) :])

    @attend.vjp
    def attend_vjp(arrays: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        given = inputs._replace(**dict(zip(names, arrays, strict=False)))
        gradients = _backward(given, rule, output, cotangent, arrays[len(names) :])
        found = [getattr(gradients, name) for name in names]
        return found + [mx.zeros_like(array) for array in arrays[len(names) :]]

    return cast("mx.array", attend(*[getattr(inputs, name) for name in names], *kept))


def _saved_probabilities(inputs: AttentionInputs, rule: AttentionOptions) -> list[mx.array]:
    """The probabilities of every chunk, where keeping them is cheap. (B, H, C, S) each"""
    scores = sum((c.end - c.start) * (c.seen - c.first) for c in rule.chunks)
    if (
        not on_cpu()
        or inputs.sinks is not None
        or scores > MAX_SAVED_KEYS * inputs.queries.shape[2]
    ):
        return []
    given = {name: mx.stop_gradient(x) for name, x in inputs._asdict().items() if x is not None}
    fixed = inputs._replace(**given)
    return [_probabilities(_chunk_inputs(fixed, chunk), rule, chunk)[0] for chunk in rule.chunks]


def _forward(inputs: AttentionInputs, rule: AttentionOptions, kept: Sequence[mx.array]) -> mx.array:
    outputs: list[mx.array] = []
    for number, chunk in enumerate(rule.chunks):
        part = _chunk_inputs(inputs, chunk)
        if kept:
            outputs.append(_weighted_values(kept[number], part))
            continue
        # Without an order MLX starts every chunk before it ends one, and all are in memory.
        queries = mx.depends(part.queries, outputs[-1:]) if outputs else part.queries
        outputs.append(_attend_chunk(part._replace(queries=queries), rule, chunk))
    return mx.concatenate(outputs, axis=2)


def _chunk_inputs(inputs: AttentionInputs, chunk: QueryChunk) -> AttentionInputs:
    mask = inputs.mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, chunk.start : chunk.end]
    return AttentionInputs(
        inputs.queries[:, :, chunk.start : chunk.end],
        inputs.keys[:, :, chunk.first : chunk.seen],
        inputs.values[:, :, chunk.first : chunk.seen],
        mask,
        inputs.sinks,
    )


def _attend_chunk(part: AttentionInputs, rule: AttentionOptions, chunk: QueryChunk) -> mx.array:
    """One chunk of queries. (B, H, C, E)"""
    if not on_cpu():
        q, k, v, mask, sinks = part
        hidden = "causal" if rule.causal else mask if chunk.hidden is None else chunk.hidden
        return rule.plain(q, k, v, scale=rule.scale, mask=hidden, sinks=sinks)
    probabilities, _ = _probabilities(part, rule, chunk)
    return _weighted_values(probabilities, part)


def _weighted_values(probabilities: mx.array, part: AttentionInputs) -> mx.array:
    """The values, as much of each as is given. (B, H, C, E)"""
    return _ungroup(_group_by_key_head(probabilities, part.keys) @ part.values, part.queries)


def _backward(
    inputs: AttentionInputs,
    rule: AttentionOptions,
    output: mx.array,
    cotangent: mx.array,
    kept: Sequence[mx.array],
) -> AttentionInputs:
    """Gradients towards the inputs, a chunk at a time; sums over chunks are float32."""
    queries: list[mx.array] = []
    masks: list[mx.array | None] = []
    sinks: list[mx.array | None] = []
    keys = mx.zeros(inputs.keys.shape, mx.float32)
    values = mx.zeros(inputs.values.shape, mx.float32)
    for number, chunk in enumerate(rule.chunks):
        part = _chunk_inputs(inputs, chunk)
        if queries:
            # The sums pass through: held by nothing else, they are added to in place.
            waiting = [part.queries, keys, values]
            here, keys, values = mx.depends(waiting, queries[-1:])
            part = part._replace(queries=here)
        rows, seen = slice(chunk.start, chunk.end), slice(chunk.first, chunk.seen)
        given = output[:, :, rows], cotangent[:, :, rows]
        probabilities = (kept[number], None) if kept else _probabilities(part, rule, chunk)
        found = _chunk_gradients(part, rule, probabilities, *given)
        keys = keys.at[:, :, seen].add(found.keys)
        values = values.at[:, :, seen].add(found.values)
        queries.append(found.queries)
        masks.append(found.mask)
        sinks.append(found.sinks)
    return AttentionInputs(
        mx.concatenate(queries, axis=2),
        keys.astype(inputs.keys.dtype),
        values.astype(inputs.values.dtype),
        _join_gradients(inputs.mask, masks),
        _join_gradients(inputs.sinks, sinks),
    )


def _join_gradients(value: mx.array | None, parts: Sequence[mx.array | None]) -> mx.array | None:
    """The gradient towards a mask or sinks: one part for each chunk's rows, or summed."""
    found = [part for part in parts if part is not None]
    if value is None or not found:
        return None
    if value.ndim == 4 and value.shape[2] > 1:
        return mx.concatenate(found, axis=2).astype(value.dtype)
    return mx.stack(found).sum(0).astype(value.dtype)


def _chunk_gradients(
    part: AttentionInputs,
    rule: AttentionOptions,
    given: Probabilities,
    output: mx.array,
    cotangent: mx.array,
) -> AttentionInputs:
    """With p = softmax(s) and o = p v:  ds = p (do v' - do·o),  dq = ds k,  dk = ds' q."""
    probabilities, sink = given
    out = _group_by_key_head(cotangent, part.keys)
    agreement = (cotangent.astype(mx.float32) * output).sum(-1, keepdims=True)
    towards = _ungroup(out @ part.values.swapaxes(-1, -2), part.queries)
    scores = probabilities * (towards - agreement).astype(probabilities.dtype)
    if part.mask is not None and part.mask.dtype == mx.bool_:
        scores = scores * part.mask  # a row that sees nothing moves no score
    grouped = _group_by_key_head(scores, part.keys)
    return AttentionInputs(
        queries=_ungroup(grouped @ part.keys, part.queries) * rule.scale,
        keys=grouped.swapaxes(-1, -2) @ _group_by_key_head(part.queries * rule.scale, part.keys),
        values=_group_by_key_head(probabilities, part.keys).swapaxes(-1, -2) @ out,
        mask=None if part.mask is None else _sum_to_shape(scores, part.mask),
        sinks=None if sink is None else -(sink * agreement).sum((0, 2, 3)),
    )


def _sum_to_shape(gradient: mx.array, value: mx.array) -> mx.array:
    """Summed over the axes along which `value` was repeated. Shape of `value`"""
    axes = [axis for axis, size in enumerate(value.shape) if size == 1]
    return gradient.sum(axes, keepdims=True) if axes else gradient


def _probabilities(
    part: AttentionInputs, rule: AttentionOptions, chunk: QueryChunk
) -> Probabilities:
    """What each query gives to each key, and to the sink. (B, H, C, S), (B, H, C, 1)"""
    queries = _group_by_key_head(part.queries * rule.scale, part.keys)
    scores = _ungroup(queries @ part.keys.swapaxes(-1, -2), part.queries)
    if rule.causal:
        scores = scores + causal_mask(scores.shape[-2], scores.shape[-1], scores.dtype)
    elif chunk.hidden is not None:
        scores = scores + chunk.hidden
    elif part.mask is not None:
        scores = scores + additive_mask(part.mask, scores.dtype)
    if part.sinks is None:
        return softmax(scores), None
    sinks = mx.broadcast_to(part.sinks.reshape(-1, 1, 1), (*scores.shape[:-1], 1))
    both = softmax(mx.concatenate([sinks.astype(scores.dtype), scores], axis=-1))
    return both[..., 1:], both[..., :1]


def _group_by_key_head(x: mx.array, keys: mx.array) -> mx.array:
    """The heads that share keys, one under the other. (B, H, C, ·) -> (B, K, H/K C, ·)"""
    return x.reshape(*keys.shape[:2], -1, x.shape[-1])


def _ungroup(x: mx.array, queries: mx.array) -> mx.array:
    """(B, K, H/K C, ·) -> (B, H, C, ·)"""
    return x.reshape(*queries.shape[:3], -1)


QUERIES_PER_CHUNK = 64  # measured on the CPU: larger chunks leave its caches
MIN_SCORES = 64 * 64  # T_q T_k; below, MLX's own is as fast and what it keeps is small


class StructuredMask(ABC):
    """A mask that is known by its structure, not as an array: which keys each chunk may see."""

    __slots__ = ()

    @abstractmethod
    def chunks(self, size: int, dtype: mx.Dtype) -> Sequence[QueryChunk]:
        """Chunks of at most `size` queries that cover all queries in order."""


@contextmanager
def use_chunked_attention(queries_per_chunk: int = QUERIES_PER_CHUNK) -> Iterator[None]:
    """Inside the block MLX's fused attention is computed in chunks of queries.

    Models of mlx-lm call it by attribute and see the change; those that write out their
    softmax do not. From inside it cannot be seen whether gradients will be asked for, so the
    block is the statement that they are: on Metal, passes without gradients belong outside,
    where MLX's fused kernel takes the whole length at once. Single queries, few scores, and
    calls that ask for `force_fused` or a stream go to MLX unchanged. Blocks nest; the
    innermost counts. The change is seen by every thread.
    """
    before: Any = mx.fast.scaled_dot_product_attention
    plain = before.args[0] if _is_patched(before) else before
    mx.fast.scaled_dot_product_attention = partial(_attention, plain, queries_per_chunk)
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = before


@contextmanager
def use_structured_masks() -> Iterator[None]:
    """Inside the block MLX's fused attention takes a `Mask`, and all else as it would before."""
    before: Any = mx.fast.scaled_dot_product_attention
    if _is_patched(before):
        yield
        return
    mx.fast.scaled_dot_product_attention = partial(_attention, before, None)
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = before


def _is_patched(function: Any) -> bool:
    return isinstance(function, partial) and function.func is _attention


def _attention(
    plain: Attention,
    queries_per_chunk: int | None,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: str | mx.array | StructuredMask | None = None,
    sinks: mx.array | None = None,
    **more: Any,
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention`. (B, H, T_q, E)"""
    if isinstance(mask, StructuredMask):
        chunks = mask.chunks(queries_per_chunk or q.shape[2], q.dtype)
        return chunked_attention(
            AttentionInputs(q, k, v, None, sinks),
            AttentionOptions(plain, more["scale"], False, chunks),
        )
    if (
        queries_per_chunk is None
        or more.keys() != {"scale"}
        or not _is_worth_chunking(q.shape[2], k.shape[2], mask)
    ):
        return plain(q, k, v, mask=mask, sinks=sinks, **more)
    array = mask if isinstance(mask, mx.array) else None
    if array is not None:
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    chunks = list(_query_chunks(q.shape[2], k.shape[2], queries_per_chunk, causal=mask == "causal"))
    rule = AttentionOptions(plain, more["scale"], mask == "causal", chunks)
    return chunked_attention(AttentionInputs(q, k, v, array, sinks), rule)


def _is_worth_chunking(length: int, seen: int, mask: str | mx.array | None) -> bool:
    if length == 1 or length * seen < MIN_SCORES:
        return False
    return not isinstance(mask, str) or (mask == "causal" and length <= seen)


def _query_chunks(length: int, seen: int, size: int, *, causal: bool) -> Iterator[QueryChunk]:
    for start in range(0, length, size):
        end = min(start + size, length)
        # The last query sees the last key, also where there are more keys than queries.
        yield QueryChunk(start, end, 0, seen - length + end if causal else seen)
