"""Attention that never keeps a T×T array: in chunks of queries, computed again for gradients.

MLX keeps the probabilities of every head and layer for the backward pass. Here a chunk of
queries meets only the keys it may see, one chunk at a time, and only queries, keys, values
and outputs stay. Gradients are MLX's own up to rounding. Knows arrays, nothing of models.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlx_dpo.policy.masks import added, causal
from mlx_dpo.policy.softmax import on_cpu, softmax

QUERIES_PER_CHUNK = 64  # measured on the CPU: larger chunks leave its caches
FEWEST_SCORES = 64 * 64  # T_q T_k; below, MLX's own is as fast and what it keeps is small

Attention = Callable[..., mx.array]


class _Inputs(NamedTuple):
    """What attention is given, a chunk of it, or the gradients towards it."""

    queries: mx.array  # (B, H, T_q, D)
    keys: mx.array  # (B, K, T_k, D), H a multiple of K
    values: mx.array  # (B, K, T_k, E)
    mask: mx.array | None  # bool, or added to the scores; broadcasts to (B, H, T_q, T_k)
    sinks: mx.array | None  # (H,) scores of a key without a value


class _Chunk(NamedTuple):
    start: int  # first query
    end: int  # one past the last query
    seen: int  # keys up to here


class _Rule(NamedTuple):
    """What is the same for every chunk."""

    plain: Attention
    scale: float
    causal: bool
    queries_per_chunk: int


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


def _is_ours(function: Any) -> bool:
    return isinstance(function, partial) and function.func is _attention


def _attention(
    plain: Attention,
    queries_per_chunk: int,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
    **more: Any,
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention`. (B, H, T_q, E)"""
    rule = _Rule(plain, more.get("scale", 1.0), mask == "causal", queries_per_chunk)
    if more.keys() != {"scale"} or not _worth_chunks(q.shape[2], k.shape[2], mask):
        return plain(q, k, v, mask=mask, sinks=sinks, **more)
    array = mask if isinstance(mask, mx.array) else None
    if array is not None:
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return _recomputed(_Inputs(q, k, v, array, sinks), rule)


def _worth_chunks(length: int, seen: int, mask: str | mx.array | None) -> bool:
    if length == 1 or length * seen < FEWEST_SCORES:
        return False
    return not isinstance(mask, str) or (mask == "causal" and length <= seen)


def _recomputed(inputs: _Inputs, rule: _Rule) -> mx.array:
    """Attention of which only inputs and output are kept. (B, H, T_q, E)

    A captured array gets no gradient, so everything that may want one is an argument.
    """
    names = [
        name
        for name, value in inputs._asdict().items()
        if value is not None and mx.issubdtype(value.dtype, mx.floating)
    ]

    @mx.custom_function
    def attend(*arrays: mx.array) -> mx.array:
        return _forward(inputs._replace(**dict(zip(names, arrays, strict=True))), rule)

    @attend.vjp
    def attend_vjp(arrays: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        given = inputs._replace(**dict(zip(names, arrays, strict=True)))
        gradients = _backward(given, rule, output, cotangent)
        return [getattr(gradients, name) for name in names]

    return cast("mx.array", attend(*[getattr(inputs, name) for name in names]))


def _forward(inputs: _Inputs, rule: _Rule) -> mx.array:
    outputs: list[mx.array] = []
    for chunk in _chunks(inputs, rule):
        part = _cut(inputs, chunk)
        # Without an order MLX starts every chunk before it ends one, and all are in memory.
        queries = mx.depends(part.queries, outputs[-1:]) if outputs else part.queries
        outputs.append(_attend(part._replace(queries=queries), rule))
    return mx.concatenate(outputs, axis=2)


def _chunks(inputs: _Inputs, rule: _Rule) -> Iterator[_Chunk]:
    length, seen = inputs.queries.shape[2], inputs.keys.shape[2]
    for start in range(0, length, rule.queries_per_chunk):
        end = min(start + rule.queries_per_chunk, length)
        # The last query sees the last key, also where there are more keys than queries.
        yield _Chunk(start, end, seen - length + end if rule.causal else seen)


def _cut(inputs: _Inputs, chunk: _Chunk) -> _Inputs:
    start, end, seen = chunk
    mask = inputs.mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, start:end]
    return _Inputs(
        inputs.queries[:, :, start:end],
        inputs.keys[:, :, :seen],
        inputs.values[:, :, :seen],
        mask,
        inputs.sinks,
    )


def _attend(part: _Inputs, rule: _Rule) -> mx.array:
    """One chunk of queries. (B, H, C, E)"""
    if not on_cpu():
        mask = "causal" if rule.causal else part.mask
        q, k, v, _, sinks = part
        return rule.plain(q, k, v, scale=rule.scale, mask=mask, sinks=sinks)
    probabilities, _ = _probabilities(part, rule)
    return _per_head(_grouped(probabilities, part.keys) @ part.values, part.queries)


def _backward(inputs: _Inputs, rule: _Rule, output: mx.array, cotangent: mx.array) -> _Inputs:
    """Gradients towards the inputs, a chunk at a time; sums over chunks are float32."""
    parts: list[_Inputs] = []
    keys = mx.zeros(inputs.keys.shape, mx.float32)
    values = mx.zeros(inputs.values.shape, mx.float32)
    for chunk in _chunks(inputs, rule):
        part = _cut(inputs, chunk)
        if parts:
            done = [parts[-1].queries, keys, values]
            part = part._replace(queries=mx.depends(part.queries, done))
        rows = slice(chunk.start, chunk.end)
        parts.append(_chunk_gradients(part, rule, output[:, :, rows], cotangent[:, :, rows]))
        keys = keys.at[:, :, : chunk.seen].add(parts[-1].keys)
        values = values.at[:, :, : chunk.seen].add(parts[-1].values)
    return _Inputs(
        mx.concatenate([part.queries for part in parts], axis=2),
        keys.astype(inputs.keys.dtype),
        values.astype(inputs.values.dtype),
        _joined(inputs.mask, [part.mask for part in parts]),
        _joined(inputs.sinks, [part.sinks for part in parts]),
    )


def _joined(value: mx.array | None, parts: Sequence[mx.array | None]) -> mx.array | None:
    """The gradient towards a mask or sinks: one part for each chunk's rows, or summed."""
    found = [part for part in parts if part is not None]
    if value is None or not found:
        return None
    if value.ndim == 4 and value.shape[2] > 1:
        return mx.concatenate(found, axis=2).astype(value.dtype)
    return mx.stack(found).sum(0).astype(value.dtype)


def _chunk_gradients(part: _Inputs, rule: _Rule, output: mx.array, cotangent: mx.array) -> _Inputs:
    """With p = softmax(s) and o = p v:  ds = p (do v' - do·o),  dq = ds k,  dk = ds' q."""
    probabilities, sink = _probabilities(part, rule)
    out = _grouped(cotangent, part.keys)
    agreement = (cotangent.astype(mx.float32) * output).sum(-1, keepdims=True)
    towards = _per_head(out @ part.values.swapaxes(-1, -2), part.queries)
    scores = probabilities * (towards - agreement).astype(probabilities.dtype)
    if part.mask is not None and part.mask.dtype == mx.bool_:
        scores = scores * part.mask  # a row that sees nothing moves no score
    grouped = _grouped(scores, part.keys)
    return _Inputs(
        queries=_per_head(grouped @ part.keys, part.queries) * rule.scale,
        keys=grouped.swapaxes(-1, -2) @ _grouped(part.queries * rule.scale, part.keys),
        values=_grouped(probabilities, part.keys).swapaxes(-1, -2) @ out,
        mask=None if part.mask is None else _unbroadcast(scores, part.mask),
        sinks=None if sink is None else -(sink * agreement).sum((0, 2, 3)),
    )


def _unbroadcast(gradient: mx.array, value: mx.array) -> mx.array:
    """Summed over the axes along which `value` was repeated. Shape of `value`"""
    axes = [axis for axis, size in enumerate(value.shape) if size == 1]
    return gradient.sum(axes, keepdims=True) if axes else gradient


def _probabilities(part: _Inputs, rule: _Rule) -> tuple[mx.array, mx.array | None]:
    """What each query gives to each key, and to the sink. (B, H, C, S), (B, H, C, 1)"""
    queries = _grouped(part.queries * rule.scale, part.keys)
    scores = _per_head(queries @ part.keys.swapaxes(-1, -2), part.queries)
    if rule.causal:
        scores = scores + causal(scores.shape[-2], scores.shape[-1], scores.dtype)
    elif part.mask is not None:
        scores = scores + added(part.mask, scores.dtype)
    if part.sinks is None:
        return softmax(scores), None
    sinks = mx.broadcast_to(part.sinks.reshape(-1, 1, 1), (*scores.shape[:-1], 1))
    both = softmax(mx.concatenate([sinks.astype(scores.dtype), scores], axis=-1))
    return both[..., 1:], both[..., :1]


def _grouped(x: mx.array, keys: mx.array) -> mx.array:
    """The heads that share keys, one under the other. (B, H, C, ·) -> (B, K, H/K C, ·)"""
    return x.reshape(*keys.shape[:2], -1, x.shape[-1])


def _per_head(x: mx.array, queries: mx.array) -> mx.array:
    """(B, K, H/K C, ·) -> (B, H, C, ·)"""
    return x.reshape(*queries.shape[:3], -1)
