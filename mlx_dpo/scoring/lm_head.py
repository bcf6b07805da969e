"""Hidden states → log-probabilities of their targets, without an array over all rows and words.

Rows go through the head in chunks, one after the other, so that memory is that of one chunk.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.scoring.backbone import ModelParts
from mlx_dpo.scoring.logps import log_weights, logsumexp

LOGITS_BYTES_PER_CHUNK = (
    32 * 2**20
)  # one float32 array of logits; MLX has about ten of them in flight

ChunkFunction = Callable[
    [ModelParts, mx.array, mx.array], mx.array
]  # of a chunk. (n, D), (n,) -> (n,)


def chunked_logps(
    halves: ModelParts, hidden: mx.array, targets: mx.array, *, vocab_size: int, gradients: bool
) -> mx.array:
    """log p(target | hidden state) of each row. (n, D), (n,) -> (n,) float32

    Without `gradients` the value alone is right.
    """
    chunks = _row_chunks(len(targets), vocab_size)
    if not gradients:
        return mx.stop_gradient(_map_chunks(halves, hidden, targets, chunks))
    if weights := trainable_head_parameters(halves):
        return _logps_with_recomputed_gradient(halves, weights, hidden, targets, chunks)
    return _logps_with_saved_gradient(halves, hidden, targets, chunks)


def chunked_log_weights(
    halves: ModelParts, hidden: mx.array, targets: mx.array, *, vocab_size: int
) -> mx.array:
    """`logps.token_alignments` of each row, the value alone. (n, D), (n,) -> (n,) float32"""
    chunks = _row_chunks(len(targets), vocab_size)
    return mx.stop_gradient(_map_chunks(halves, hidden, targets, chunks, of=_chunk_log_weights))


def trainable_head_parameters(halves: ModelParts) -> Arrays:
    """What is trained outside the blocks, and so may be part of the head, by name."""
    blocks = {id(block) for block in halves.blocks}
    modules = halves.outer.named_modules()
    inside = tuple(f"{name}." for name, module in modules if id(module) in blocks)
    trained = named_arrays(halves.outer.trainable_parameters())
    return {name: value for name, value in trained.items() if not name.startswith(inside)}


def _row_chunks(count: int, vocab_size: int) -> list[slice]:
    """Slices of like size that cover `count` rows, each within CHUNK_BYTES of logits."""
    most = max(1, LOGITS_BYTES_PER_CHUNK // (vocab_size * mx.float32.size))
    size = -(-count // -(-count // most))
    return [slice(start, start + size) for start in range(0, count, size)]


def _evaluated_after(value: mx.array, earlier: Iterable[mx.array]) -> mx.array:
    """`value`, not to be used before `earlier` is there: MLX would begin all chunks at once."""
    before = list(earlier)
    return mx.depends([value], before)[0] if before else value


def _chunk_logps(halves: ModelParts, hidden: mx.array, targets: mx.array) -> mx.array:
    """One chunk. (n, D), (n,) -> (n,) float32"""
    logits = halves.logits(hidden[None])[0].astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return picked - logsumexp(logits)


def _chunk_log_weights(halves: ModelParts, hidden: mx.array, targets: mx.array) -> mx.array:
    """One chunk. (n, D), (n,) -> (n,) float32"""
    return log_weights(halves.logits(hidden[None])[0].astype(mx.float32), targets)


def _map_chunks(
    halves: ModelParts,
    hidden: mx.array,
    targets: mx.array,
    chunks: list[slice],
    *,
    of: ChunkFunction = _chunk_logps,
) -> mx.array:
    parts: list[mx.array] = []
    for rows in chunks:
        parts.append(of(halves, _evaluated_after(hidden[rows], parts[-1:]), targets[rows]))
    return mx.concatenate(parts)


def _logps_with_saved_gradient(
    halves: ModelParts, hidden: mx.array, targets: mx.array, chunks: list[slice]
) -> mx.array:
    """For a frozen head: the slope towards the hidden states comes from the same pass.

    It is computed beside the value while the logits are there, and kept in their place:
    (n, D) instead of (n, V).
    """
    detached = mx.stop_gradient(hidden)
    values: list[mx.array] = []
    slopes: list[mx.array] = []
    for rows in chunks:
        chunk = _evaluated_after(detached[rows], [*values[-1:], *slopes[-1:]])
        value, slope = _chunk_logps_and_gradient(halves, chunk, targets[rows])
        values.append(value)
        slopes.append(slope)
    slope = mx.stop_gradient(mx.concatenate(slopes)).astype(mx.float32)
    # Zero in value, `slope` in gradient.
    carried = ((hidden - detached).astype(mx.float32) * slope).sum(axis=-1)
    return mx.stop_gradient(mx.concatenate(values)) + carried


def _chunk_logps_and_gradient(
    halves: ModelParts, hidden: mx.array, targets: mx.array
) -> tuple[mx.array, mx.array]:
    """One chunk: log-probabilities, and the gradient of each. (n,), (n, D)"""
    # A row's value depends on its own hidden state alone: ones give every row's gradient.
    ones = mx.ones(targets.shape)
    [value], [slope] = mx.vjp(lambda rows: _chunk_logps(halves, rows, targets), [hidden], [ones])
    return value, slope


def _logps_with_recomputed_gradient(
    halves: ModelParts, weights: Arrays, hidden: mx.array, targets: mx.array, chunks: list[slice]
) -> mx.array:
    """For a head that is trained: each chunk is computed again when gradients are wanted.

    Its weights are arguments: what a custom function merely reads gets no gradient.
    """

    def with_weights(values: list[mx.array], chunk: mx.array, rows: slice) -> mx.array:
        # Gradients are built later, when the model may hold its weights in another type.
        held = named_arrays(halves.outer.trainable_parameters())
        halves.outer.update(tree_unflatten(list(zip(weights, values, strict=True))))
        try:
            return _chunk_logps(halves, chunk, targets[rows])
        finally:
            halves.outer.update(tree_unflatten([(name, held[name]) for name in weights]))

    @mx.custom_function
    def forward(values: list[mx.array], hidden: mx.array) -> mx.array:
        parts: list[mx.array] = []
        for rows in chunks:
            parts.append(with_weights(values, _evaluated_after(hidden[rows], parts[-1:]), rows))
        return mx.concatenate(parts)

    @forward.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        values, hidden = primals
        totals, slopes = [mx.zeros_like(value) for value in values], [output]
        for rows in chunks:
            chunk = _evaluated_after(hidden[rows], [slopes[-1], *totals])
            _, gradients = mx.vjp(
                lambda *given, rows=rows: with_weights(list(given[:-1]), given[-1], rows),
                [*values, chunk],
                [cotangent[rows]],
            )
            *more, slope = gradients
            totals = [total + new for total, new in zip(totals, more, strict=True)]
            slopes.append(slope)
        return totals, mx.concatenate(slopes[1:])

    return cast(mx.array, forward(list(weights.values()), hidden))
