"""Log-probs of target tokens from hidden states, without the full array of logits.

The logits of n tokens over a vocabulary of V tokens are the largest array of training. Here the
LM head is applied to one chunk of tokens after another, so that only the logits of one chunk are in
memory. This is the idea of chunked (or fused linear) cross-entropy.

Shape letters: n tokens, D width of hidden states, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_dpo.io.arrays import Arrays, named_arrays, random_state
from mlx_dpo.models.device import is_cpu
from mlx_dpo.models.restore import preserved_random_state
from mlx_dpo.scoring.backbone import ModelParts
from mlx_dpo.scoring.kernels.softmax import target_logps
from mlx_dpo.scoring.logps import hits, log_weights

# Size of one float32 array of logits. MLX has about eight such arrays in flight.
LOGITS_BYTES_PER_CHUNK = 32 * 2**20

# Hidden states and targets of a chunk to one number or two per token. (n, D), (n,) -> (n,)
ChunkFunction = Callable[[ModelParts, mx.array, mx.array], mx.array]


def chunked_logps(
    parts: ModelParts,
    hidden: mx.array,
    targets: mx.array,
    *,
    vocab_size: int,
    gradients: bool,
    with_hits: bool = False,
) -> mx.array:
    """Return log p(target | hidden state) of each token. (n, D), (n,) -> (n,) float32

    Args:
        gradients: whether the result will be differentiated; False saves time and memory.
        with_hits: also return 1 for each target that the model ranks first, else 0, as a second
            column without gradient. (n, 2)
    """
    chunks = _token_chunks(len(targets), vocab_size)
    function = _chunk_logps_and_hits if with_hits else _chunk_logps
    if not gradients:
        return mx.stop_gradient(_map_chunks(parts, hidden, targets, chunks, function=function))
    if parameters := trainable_head_parameters(parts):
        head = _RecomputedHead(parts, parameters, function)
        return _logps_with_recomputed_gradient(head, hidden, targets, chunks)
    return _logps_with_saved_gradient(parts, hidden, targets, chunks, function=function)


def chunked_log_weights(
    parts: ModelParts, hidden: mx.array, targets: mx.array, *, vocab_size: int
) -> mx.array:
    """Return WPO's log-weight of each target token, without gradient. (n, D), (n,) -> (n,)

    `logps.log_weights` defines the log-weights. They are float32.
    """
    chunks = _token_chunks(len(targets), vocab_size)
    weights = _map_chunks(parts, hidden, targets, chunks, function=_chunk_log_weights)
    return mx.stop_gradient(weights)


def trainable_head_parameters(parts: ModelParts) -> Arrays:
    """Return the trainable parameters outside the layers, by name.

    These may be weights of the LM head.
    """
    layers = {id(layer) for layer in parts.layers}
    modules = parts.model.named_modules()
    inside = tuple(f"{name}." for name, module in modules if id(module) in layers)
    trainable = named_arrays(parts.model.trainable_parameters())
    return {name: value for name, value in trainable.items() if not name.startswith(inside)}


def _token_chunks(count: int, vocab_size: int) -> list[slice]:
    """Divide `count` tokens into slices of similar size.

    The logits of a slice's tokens take at most LOGITS_BYTES_PER_CHUNK, unless a single token takes
    more.
    """
    limit = max(1, LOGITS_BYTES_PER_CHUNK // (vocab_size * mx.float32.size))
    size = -(-count // -(-count // limit))
    return [slice(start, start + size) for start in range(0, count, size)]


def _evaluated_after(value: mx.array, earlier: Iterable[mx.array]) -> mx.array:
    """Return `value` with a dependency: MLX evaluates it only after the `earlier` arrays.

    MLX evaluates a graph breadth-first. Without this dependency all chunks would start before the
    first one ends, and the logits of all chunks would be in memory at once.
    """
    before = list(earlier)
    return mx.depends([value], before)[0] if before else value


def _chunk_logps(parts: ModelParts, hidden: mx.array, targets: mx.array) -> mx.array:
    """Return the log-probs of the target tokens of one chunk. (n, D), (n,) -> (n,) float32"""
    return _target_logps(_chunk_logits(parts, hidden), targets)


def _chunk_logps_and_hits(parts: ModelParts, hidden: mx.array, targets: mx.array) -> mx.array:
    """Return the log-probs of the targets of one chunk, and which of them are ranked first. (n, 2)

    The arguments are those of `_chunk_logps`.
    """
    logits = _chunk_logits(parts, hidden)
    return mx.stack([_target_logps(logits, targets), hits(logits, targets)], axis=-1)


def _chunk_logits(parts: ModelParts, hidden: mx.array) -> mx.array:
    """Return the logits of one chunk of tokens. (n, D) -> (n, V)"""
    # `squeeze`, because the gradient of an index adds the whole array to an array of zeros.
    return parts.logits(hidden[None]).squeeze(0)


def _target_logps(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the log-probs of the target tokens. (n, V), (n,) -> (n,) float32"""
    if not is_cpu():
        # One kernel, which adds in float32 whatever the dtype of the logits. On the CPU the same
        # function would add in their dtype.
        return -mx.fast.cross_entropy(logits, targets)
    return target_logps(logits.astype(mx.float32), targets)


def _chunk_log_weights(parts: ModelParts, hidden: mx.array, targets: mx.array) -> mx.array:
    """Return WPO's log-weights of the target tokens of one chunk. (n, D), (n,) -> (n,) float32"""
    return log_weights(parts.logits(hidden[None]).squeeze(0).astype(mx.float32), targets)


def _map_chunks(
    parts: ModelParts,
    hidden: mx.array,
    targets: mx.array,
    chunks: list[slice],
    *,
    function: ChunkFunction = _chunk_logps,
) -> mx.array:
    """Apply `function` to each chunk of tokens and return the concatenated results. (n,)"""
    values: list[mx.array] = []
    for rows in chunks:
        chunk = _evaluated_after(hidden[rows], values[-1:])
        values.append(function(parts, chunk, targets[rows]))
    return mx.concatenate(values)


def _logps_with_saved_gradient(
    parts: ModelParts,
    hidden: mx.array,
    targets: mx.array,
    chunks: list[slice],
    *,
    function: ChunkFunction,
) -> mx.array:
    """Return the values of the targets under a frozen head, which runs once per chunk.

    They are log-probs, (n,), or log-probs with a second column that has no gradient, (n, 2).

    The gradient with respect to the hidden states is computed in the forward pass, while the
    logits of a chunk are in memory. Saving it takes an array of (n, D) instead of (n, V).
    """
    constant = mx.stop_gradient(hidden)
    values: list[mx.array] = []  # (n,) each
    gradients: list[mx.array] = []  # (n, D) each
    for rows in chunks:
        chunk = _evaluated_after(constant[rows], [*values[-1:], *gradients[-1:]])
        value, gradient = _chunk_values_and_gradient(function, parts, chunk, targets[rows])
        values.append(value)
        gradients.append(gradient)
    gradient = mx.stop_gradient(mx.concatenate(gradients)).astype(mx.float32)
    # A term whose value is zero and whose gradient is `gradient`: a custom VJP by arithmetic.
    gradient_term = ((hidden - constant).astype(mx.float32) * gradient).sum(axis=-1)
    result = mx.stop_gradient(mx.concatenate(values))
    if result.ndim == 2:
        gradient_term = mx.stack([gradient_term, mx.zeros_like(gradient_term)], axis=-1)
    return result + gradient_term


def _chunk_values_and_gradient(
    function: ChunkFunction, parts: ModelParts, hidden: mx.array, targets: mx.array
) -> tuple[mx.array, mx.array]:
    """Return one chunk's values and their gradients with respect to `hidden`. (n, …), (n, D)"""
    # A token's value depends on its own hidden state only, so that a cotangent of ones gives
    # the gradients of all tokens at once.
    shape = targets.shape if function is _chunk_logps else (*targets.shape, 2)
    [value], [gradient] = mx.vjp(
        lambda rows: function(parts, rows, targets), [hidden], [mx.ones(shape)]
    )
    return value, gradient


class _RecomputedHead(NamedTuple):
    """A trainable LM head: the model, its trainable parameters outside the layers, a function."""

    parts: ModelParts
    parameters: Arrays
    function: ChunkFunction


def _logps_with_recomputed_gradient(
    head: _RecomputedHead, hidden: mx.array, targets: mx.array, chunks: list[slice]
) -> mx.array:
    """Return the values of the targets under a trainable head. (n,) or (n, 2)

    The gradient of the head's weights depends on the cotangent of every token, so it cannot be
    computed in the forward pass. The backward pass runs each chunk again. The weights are
    arguments, because `mx.custom_function` gives no gradient to captured arrays.
    """

    parts, parameters, function = head

    def logps(values: list[mx.array], chunk: mx.array, rows: slice) -> mx.array:
        # The backward graph is built later, when the model may hold weights of another dtype.
        current = named_arrays(parts.model.trainable_parameters())
        parts.model.update(tree_unflatten(list(zip(parameters, values, strict=True))))
        try:
            return function(parts, chunk, targets[rows])
        finally:
            parts.model.update(tree_unflatten([(name, current[name]) for name in parameters]))

    states: list[mx.array] = []  # the random state before each chunk: dropout is drawn again

    @mx.custom_function
    def forward(values: list[mx.array], hidden: mx.array) -> mx.array:
        outputs: list[mx.array] = []
        states.clear()
        for rows in chunks:
            states.append(mx.array(random_state()))
            outputs.append(logps(values, _evaluated_after(hidden[rows], outputs[-1:]), rows))
        return mx.concatenate(outputs)

    @forward.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        values, hidden = primals
        sums = [mx.zeros_like(value) for value in values]  # gradients of the parameters
        hidden_gradients = [output]  # the first chunk waits for the forward pass
        for rows, state in zip(chunks, states, strict=True):
            chunk = _evaluated_after(hidden[rows], [hidden_gradients[-1], *sums])
            with preserved_random_state(state):
                _, gradients = mx.vjp(
                    lambda *inputs, rows=rows: logps(list(inputs[:-1]), inputs[-1], rows),
                    [*values, chunk],
                    [cotangent[rows]],
                )
            *parameter_gradients, hidden_gradient = gradients
            sums = [total + new for total, new in zip(sums, parameter_gradients, strict=True)]
            hidden_gradients.append(hidden_gradient)
        return sums, mx.concatenate(hidden_gradients[1:])

    return cast(mx.array, forward(list(parameters.values()), hidden))
