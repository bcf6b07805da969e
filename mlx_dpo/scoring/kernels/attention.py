"""Attention in chunks of queries; the backward pass recomputes the probabilities of each chunk.

MLX saves the attention probabilities of every head and layer for the backward pass: an array of T
x T per head. Here a custom VJP saves only inputs and output, like FlashAttention (Dao et al. 2022,
arXiv:2205.14135), so that memory grows with T x C for chunks of C queries.

Shape letters: B sequences, H query heads, K key heads (H is a multiple of K: grouped-query
attention), T_q queries, T_k keys, C queries of a chunk, S keys that the chunk sees, D width of
queries and keys, E width of values.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add, sub
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlx_dpo.models.device import device_kind, is_cpu
from mlx_dpo.scoring.kernels.softmax import softmax

# Keys per query, on average, up to which the CPU saves probabilities for the backward pass
# instead of computing them again: few bytes next to a layer's other activations, and a third of
# the time of attention.
MAX_SAVED_KEYS = 256

# Head widths for which MLX has a fused kernel on Metal that it finds faster than its unfused path
# (`ScaledDotProductAttention::use_fallback`), and the queries up to which it takes another kernel.
FUSED_WIDTHS, MAX_VECTOR_QUERIES = (64, 72, 80, 96, 128), 8

Attention = Callable[..., mx.array]  # signature of `mx.fast.scaled_dot_product_attention`
Probabilities = tuple[mx.array, mx.array | None]  # (B, H, C, S), and of sinks (B, H, C, 1)


class AttentionInputs(NamedTuple):
    """Inputs of an attention call or of one of its chunks; also holds the inputs' gradients."""

    queries: mx.array  # (B, H, T_q, D)
    keys: mx.array  # (B, K, T_k, D)
    values: mx.array  # (B, K, T_k, E)
    mask: mx.array | None  # bool, or added to the scores; broadcasts to (B, H, T_q, T_k)
    sinks: mx.array | None  # (H,) scores of a key without a value


class QueryChunk(NamedTuple):
    """A range of queries, and the ranges of keys that these queries see."""

    query_start: int
    query_end: int
    key_ranges: tuple[tuple[int, int], ...]  # (start, end) in ascending order; S keys in all
    mask: mx.array | None = None  # (C, S), added to the scores of this chunk
    # Whether the last query sees all S keys, and each query before it one key less. A GPU then
    # skips hidden keys; elsewhere `mask`, if given, must hide the same keys.
    is_causal: bool = False

    @property
    def num_keys(self) -> int:
        """Number of keys that the chunk sees, S."""
        return sum(end - start for start, end in self.key_ranges)


class AttentionOptions(NamedTuple):
    """Options of an attention call: fused function, score scale, and query chunks."""

    fused_attention: Attention  # MLX's own
    scale: float
    chunks: Sequence[QueryChunk]


def chunked_attention(inputs: AttentionInputs, options: AttentionOptions) -> mx.array:
    """Return the attention output, computed and differentiated chunk by chunk. (B, H, T_q, E)"""
    # `mx.custom_function` gives no gradient to arrays that its function captures, so every
    # array that may need a gradient is passed as an argument.
    names = [
        name
        for name, value in inputs._asdict().items()
        if value is not None and mx.issubdtype(value.dtype, mx.floating)
    ]
    saved = _saved_probabilities(inputs, options)

    @mx.custom_function
    def attend(*arrays: mx.array) -> mx.array:
        arguments = dict(zip(names, arrays, strict=False))  # saved probabilities follow
        return _forward(inputs._replace(**arguments), options, arrays[len(names) :])

    @attend.vjp
    def attend_vjp(arrays: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        arguments = inputs._replace(**dict(zip(names, arrays, strict=False)))
        gradients = _backward(arguments, options, output, cotangent, arrays[len(names) :])
        # Saved probabilities are constants: the gradients of queries and keys include theirs.
        zeros = [mx.zeros_like(array) for array in arrays[len(names) :]]
        return [getattr(gradients, name) for name in names] + zeros

    return cast("mx.array", attend(*[getattr(inputs, name) for name in names], *saved))


def _saved_probabilities(inputs: AttentionInputs, options: AttentionOptions) -> list[mx.array]:
    """Return the attention probabilities of every chunk if saving them is cheap. (B, H, C, S) each

    An empty list means that the backward pass computes the probabilities again.
    """
    scores = sum((chunk.query_end - chunk.query_start) * chunk.num_keys for chunk in options.chunks)
    is_large = scores > MAX_SAVED_KEYS * inputs.queries.shape[2]
    if not is_cpu() or inputs.sinks is not None or is_large:
        return []
    arrays = {name: mx.stop_gradient(x) for name, x in inputs._asdict().items() if x is not None}
    constant = _with_scaled_queries(inputs._replace(**arrays), options)
    return [_probabilities(_chunk_inputs(constant, chunk), chunk)[0] for chunk in options.chunks]


def _with_scaled_queries(inputs: AttentionInputs, options: AttentionOptions) -> AttentionInputs:
    """Return the inputs with the queries multiplied by the score scale, for all chunks at once."""
    return inputs._replace(queries=inputs.queries * options.scale)


def _forward(
    inputs: AttentionInputs, options: AttentionOptions, saved: Sequence[mx.array]
) -> mx.array:
    """Return the attention output, computed chunk by chunk. (B, H, T_q, E)

    Args:
        saved: attention probabilities of every chunk if they were saved, otherwise empty.
    """
    outputs: list[mx.array] = []  # (B, H, C, E) each
    if is_cpu() and not saved:
        inputs = _with_scaled_queries(inputs, options)
    for index, chunk in enumerate(options.chunks):
        part = _chunk_inputs(inputs, chunk)
        if saved:
            outputs.append(_weighted_values(saved[index], part))
            continue
        # Each chunk waits for the previous one. MLX evaluates a graph breadth-first and would
        # otherwise hold the scores of all chunks in memory at once.
        queries = mx.depends(part.queries, outputs[-1:]) if outputs else part.queries
        outputs.append(_attend_chunk(part._replace(queries=queries), options, chunk))
    return mx.concatenate(outputs, axis=2)


def _chunk_inputs(inputs: AttentionInputs, chunk: QueryChunk) -> AttentionInputs:
    """Return the inputs of one chunk: its queries, and the keys and values that the queries see."""
    mask = inputs.mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, chunk.query_start : chunk.query_end]
    return AttentionInputs(
        inputs.queries[:, :, chunk.query_start : chunk.query_end],
        _seen_by(chunk, inputs.keys),
        _seen_by(chunk, inputs.values),
        mask,
        inputs.sinks,
    )


def _seen_by(chunk: QueryChunk, x: mx.array) -> mx.array:
    """Return the keys or values that the chunk sees. (B, K, T_k, ·) -> (B, K, S, ·)"""
    parts = [x[:, :, start:end] for start, end in chunk.key_ranges]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _token_zeros(x: mx.array) -> mx.array:
    """Return float32 zeros to sum gradients of keys or values in. (B, K, T_k, ·) -> (T_k, B, K, ·)

    Tokens come first, so that the keys of a range are contiguous.
    """
    batch, heads, tokens, width = x.shape
    return mx.zeros((tokens, batch, heads, width), mx.float32)


def _add_gradient(total: mx.array, gradient: mx.array, chunk: QueryChunk) -> mx.array:
    """Add the gradient of the keys or values that the chunk sees to that of all of them.

    Args:
        total: gradient so far, (T_k, B, K, ·).
        gradient: gradient of one chunk, (B, K, S, ·).
    """
    rows = gradient.transpose(2, 0, 1, 3)
    if is_cpu():  # MLX adds a contiguous array to contiguous rows in a twentieth of the time
        rows = mx.contiguous(rows)
    first = 0
    for start, end in chunk.key_ranges:
        total = total.at[start:end].add(rows[first : first + end - start])
        first += end - start
    return total


def _attend_chunk(part: AttentionInputs, options: AttentionOptions, chunk: QueryChunk) -> mx.array:
    """Return the attention output of one chunk. (B, H, C, E)

    The queries of `part` are scaled on the CPU only: a GPU has a fused kernel that scales them.
    """
    if is_cpu():
        return _weighted_values(_probabilities(part, chunk)[0], part)
    q, k, v, mask, sinks = part
    fused_mask = "causal" if chunk.is_causal else mask if chunk.mask is None else chunk.mask
    # MLX does not use its kernel on Metal while gradients are traced, as in a training pass. This
    # call is inside a custom function, so MLX never differentiates it.
    more = {"force_fused": True} if _has_fused_kernel(q, v) else {}
    return options.fused_attention(
        q, k, v, scale=options.scale, mask=fused_mask, sinks=sinks, **more
    )


def _has_fused_kernel(queries: mx.array, values: mx.array) -> bool:
    """Return whether MLX must be asked for its fused kernel, and has one that fits the chunk."""
    width = queries.shape[-1]
    is_supported = width in FUSED_WIDTHS and width == values.shape[-1]
    return device_kind() == "metal" and is_supported and queries.shape[2] > MAX_VECTOR_QUERIES


def _weighted_values(probabilities: mx.array, part: AttentionInputs) -> mx.array:
    """Return the values averaged with weights `probabilities`. (B, H, C, S) -> (B, H, C, E)"""
    grouped = _group_by_key_head(probabilities, part.keys)  # (B, K, H/K C, S)
    return _ungroup(grouped @ part.values, part.queries)


def _probabilities(part: AttentionInputs, chunk: QueryChunk) -> Probabilities:
    """Return the attention probabilities of the keys and of the sinks. (B, H, C, S), (B, H, C, 1)

    A sink takes part in the softmax like a key but has no value. Without sinks, the second array
    is None.

    Args:
        part: inputs of the chunk, with scaled queries.
    """
    queries = _group_by_key_head(part.queries, part.keys)  # (B, K, H/K C, D)
    scores = _ungroup(queries @ part.keys.swapaxes(-1, -2), part.queries)  # (B, H, C, S)
    if chunk.mask is not None:
        scores = scores + chunk.mask
    elif chunk.is_causal:
        scores = scores + causal_mask(scores.shape[-2], scores.shape[-1], scores.dtype)
    elif part.mask is not None:
        scores = scores + additive_mask(part.mask, scores.dtype)
    if part.sinks is None:
        return softmax(scores), None
    sinks = mx.broadcast_to(part.sinks.reshape(-1, 1, 1), (*scores.shape[:-1], 1))
    both = softmax(mx.concatenate([sinks.astype(scores.dtype), scores], axis=-1))
    return both[..., 1:], both[..., :1]


def causal_mask(queries: int, keys: int, dtype: mx.Dtype) -> mx.array:
    """Return the causal mask, to add to scores, of the last `queries` of `keys` tokens. (C, S)"""
    corner = mx.triu(mx.full((queries, queries), -mx.inf, dtype), k=1)
    return mx.pad(corner, [(0, 0), (keys - queries, 0)])


def additive_mask(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return the mask as numbers to add to the attention scores, with the shape of `mask`.

    Boolean masks are converted to numbers of `dtype`; other masks are returned unchanged.
    """
    if mask.dtype != mx.bool_:
        return mask
    # A product, because `where` is slow on the CPU. Half of the lowest number, so that a score
    # added to it does not overflow, and a query that sees no key stays finite.
    return (1 - mask.astype(dtype)) * (mx.finfo(dtype).min / 2)


def _backward(
    inputs: AttentionInputs,
    options: AttentionOptions,
    output: mx.array,  # (B, H, T_q, E)
    cotangent: mx.array,  # (B, H, T_q, E)
    saved: Sequence[mx.array],
) -> AttentionInputs:
    """Return the gradients of the attention inputs, computed chunk by chunk.

    Many chunks see the same key, so the gradients of keys and values are summed over the chunks.
    The sums are float32, because repeated addition in 16 bits loses small terms.
    """
    queries: list[mx.array] = []
    masks: list[mx.array | None] = []
    sinks: list[mx.array | None] = []
    keys = _token_zeros(inputs.keys)  # (T_k, B, K, D)
    values = _token_zeros(inputs.values)  # (T_k, B, K, E)
    # Once for all chunks: on a GPU each operation of a chunk costs the start of a kernel.
    inputs = _with_scaled_queries(inputs, options)
    row_sums = _row_sums(output, cotangent)  # (B, H, T_q, 1) each
    for index, chunk in enumerate(options.chunks):
        part = _chunk_inputs(inputs, chunk)
        if queries:
            # Chunks run one after another, as in the forward pass. The sums go through
            # `depends` too: with no other reference to them, MLX adds to them in place.
            chunk_queries, keys, values = mx.depends([part.queries, keys, values], queries[-1:])
            part = part._replace(queries=chunk_queries)
        rows = slice(chunk.query_start, chunk.query_end)
        # Without saved probabilities, this is the computation that the chunk repeats.
        weights = (saved[index], None) if saved else _probabilities(part, chunk)
        sums = [parts[:, :, rows] for parts in row_sums]
        gradients = _chunk_gradients(part, weights, sums, cotangent[:, :, rows])
        keys = _add_gradient(keys, gradients.keys, chunk)
        values = _add_gradient(values, gradients.values, chunk)
        queries.append(gradients.queries)
        masks.append(gradients.mask)
        sinks.append(gradients.sinks)
    return AttentionInputs(
        mx.concatenate(queries, axis=2) * options.scale,
        keys.transpose(1, 2, 0, 3).astype(inputs.keys.dtype),
        values.transpose(1, 2, 0, 3).astype(inputs.values.dtype),
        _join_gradients(inputs.mask, masks),
        _join_gradients(inputs.sinks, sinks),
    )


def _row_sums(output: mx.array, cotangent: mx.array) -> list[mx.array]:
    """Return arrays of the cotangent's dtype whose sum is rowsum(do * o). (B, H, T_q, 1) each

    The gradient of a row of scores sums to zero, and rounding the row's sum to 16 bits would shift
    all of them equally. In 16 bits it is therefore a rounded number and what rounding left out,
    which needs less memory than a float32 array of scores.
    """
    exact = (cotangent.astype(mx.float32) * output).sum(-1, keepdims=True)
    if cotangent.dtype == mx.float32:
        return [exact]
    rounded = exact.astype(cotangent.dtype)
    return [rounded, (exact - rounded).astype(cotangent.dtype)]


def _chunk_gradients(
    part: AttentionInputs,
    weights: Probabilities,
    row_sums: Sequence[mx.array],
    cotangent: mx.array,
) -> AttentionInputs:
    """Return the gradients of one chunk's inputs, with respect to its scaled queries.

    With scaled queries q, scores s = q k', probabilities p = softmax(s) and output o = p v:

        dv = p' do,   ds = p * (do v' - rowsum(do * o)),   dq = ds k,   dk = ds' q

    rowsum(do * o) equals rowsum(p * dp) and needs no array of C x S (FlashAttention, App. B.2).

    Args:
        part: inputs of the chunk, with scaled queries.
        row_sums: arrays that add up to rowsum(do * o) of the chunk, (B, H, C, 1) each.
    """
    probabilities, sink = weights
    grouped_cotangent = _group_by_key_head(cotangent, part.keys)  # (B, K, H/K C, E)
    d_probabilities = _ungroup(grouped_cotangent @ part.values.swapaxes(-1, -2), part.queries)
    d_scores = probabilities * reduce(sub, row_sums, d_probabilities).astype(probabilities.dtype)
    if part.mask is not None and part.mask.dtype == mx.bool_:
        # A query that sees no key has uniform probabilities, but no score to change.
        d_scores = d_scores * part.mask
    grouped = _group_by_key_head(d_scores, part.keys)  # (B, K, H/K C, S)
    grouped_probabilities = _group_by_key_head(probabilities, part.keys)
    return AttentionInputs(
        queries=_ungroup(grouped @ part.keys, part.queries),
        keys=grouped.swapaxes(-1, -2) @ _group_by_key_head(part.queries, part.keys),
        values=grouped_probabilities.swapaxes(-1, -2) @ grouped_cotangent,
        mask=None if part.mask is None else _sum_to_shape(d_scores, part.mask),
        sinks=None if sink is None else _sink_gradient(sink, row_sums),
    )


def _sink_gradient(sink: mx.array, row_sums: Sequence[mx.array]) -> mx.array:
    """Return the gradient of the sinks from their probabilities. (B, H, C, 1) -> (H,) float32"""
    row_sum = reduce(add, [part.astype(mx.float32) for part in row_sums])
    return -(sink * row_sum).sum((0, 2, 3))


def _join_gradients(value: mx.array | None, parts: Sequence[mx.array | None]) -> mx.array | None:
    """Return the gradient of `value` (a mask or sinks) from its gradients `parts` in each chunk.

    Each row of a mask of shape (·, ·, T_q, ·) belongs to one chunk, so the gradients are
    concatenated. All other values are shared by the chunks, and their gradients are summed.
    """
    gradients = [part for part in parts if part is not None]
    if value is None or not gradients:
        return None
    if value.ndim == 4 and value.shape[2] > 1:
        return mx.concatenate(gradients, axis=2).astype(value.dtype)
    return mx.stack(gradients).sum(0).astype(value.dtype)


def _sum_to_shape(gradient: mx.array, value: mx.array) -> mx.array:
    """Sum `gradient` over the axes along which `value` was broadcast: the result fits `value`."""
    axes = [axis for axis, size in enumerate(value.shape) if size == 1]
    return gradient.sum(axes, keepdims=True) if axes else gradient


def _group_by_key_head(x: mx.array, keys: mx.array) -> mx.array:
    """Group the query heads that share a key head. (B, H, C, ·) -> (B, K, H/K C, ·)"""
    return x.reshape(*keys.shape[:2], -1, x.shape[-1])


def _ungroup(x: mx.array, queries: mx.array) -> mx.array:
    """Undo `_group_by_key_head`: separate the query heads. (B, K, H/K C, ·) -> (B, H, C, ·)"""
    return x.reshape(*queries.shape[:3], -1)
