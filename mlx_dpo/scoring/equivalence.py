"""Compare the values and gradients of two functions that should compute the same from a model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_dpo.adapters.master_weights import cast_for_forward
from mlx_dpo.io.arrays import Arrays, named_arrays, scalar
from mlx_dpo.models.device import is_cpu, main_dtype
from mlx_dpo.models.restore import module_modes
from mlx_dpo.scoring.sharded.value_and_grad import value_and_grad
from mlx_dpo.types import TokenizedPair

RowFunction = Callable[[nn.Module], mx.array]  # any quantity to compare, (n, K)
SEED = 0
PERTURBATION = 0.02  # standard deviation; about the size of a trained adapter's weights
# A gradient's error is relative to its own norm, or to this share of the largest norm if that is
# more: the error of a negligible gradient is mostly rounding.
MIN_NORM_SHARE = 0.01


# Errors that models of mlx-lm and MLX raise if a model does not support what is tried.
UNSUPPORTED_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class RelativeErrors(NamedTuple):
    """Largest relative errors among the rows of an output and among parameters' gradients."""

    values: float
    gradients: float  # 0 if nothing is trainable


# Relative errors within which two computations count as the same. Float32 errs by 1e-6, matrix
# products of a GPU by up to 2e-3, 16-bit types by their rounding.
TOLERANCES = {
    "float32": RelativeErrors(1e-4, 1e-3),
    "float16": RelativeErrors(1e-2, 5e-2),
    "bfloat16": RelativeErrors(5e-2, 2e-1),
}
FLOAT32_GPU_TOLERANCE = RelativeErrors(1e-3, 1e-2)


def tolerance(model: nn.Module) -> RelativeErrors:
    """Return the relative errors that rounding explains in the dtype of the model's weights."""
    with cast_for_forward(model):
        dtype = main_dtype(model)
    is_gpu_float32 = dtype == "float32" and not is_cpu()
    return FLOAT32_GPU_TOLERANCE if is_gpu_float32 else TOLERANCES[dtype]


def random_pairs(lengths: Sequence[tuple[int, int, int]], vocab_size: int) -> list[TokenizedPair]:
    """Return preference pairs of random token ids.

    Args:
        lengths: numbers of prompt, chosen and rejected tokens of each pair.
        vocab_size: number of different token ids.
    """
    rng = np.random.default_rng(SEED)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, length).tolist())

    return [TokenizedPair(ids(p), ids(c), ids(r)) for p, c, r in lengths]


def branching_pairs(vocab_size: int) -> list[TokenizedPair]:
    """Return preference pairs of random token ids whose texts share beginnings in every way.

    Two prompts have a common beginning, and one of them has two pairs. Completions branch inside,
    one is the beginning of another, one occurs in two pairs, one is twice in its pair, and one has
    one token. The last pair shares nothing with the others.
    """
    [parts] = random_pairs([(10, 6, 6)], vocab_size)
    ids, (a, b, c, d, e, f), (g, h, i, j, k, m) = parts.prompt, parts.chosen, parts.rejected
    short, long, other = ids[:3], ids[:2] + ids[3:6], ids[6:10]
    return [
        TokenizedPair(short, (a,), (b, c, d)),
        TokenizedPair(long, (e, f, g), (e, h, i)),
        TokenizedPair(long, (e, f), (e, f, g)),
        TokenizedPair(other, (j, k, m), (j, k, m)),
    ]


@contextmanager
def mode_without_dropout(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model in training or evaluation mode inside the block, with dropout disabled.

    Some models use different kernels in the two modes.
    """
    with module_modes(model):
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        yield


def value_error(model: nn.Module, tested: RowFunction, expected: RowFunction) -> float:
    """Return the largest relative error of the output rows of `tested`, compared to `expected`.

    Both functions take the model, and run in evaluation mode.
    """
    with mode_without_dropout(model, training=False):
        return max_value_error(tested(model), expected(model))


def relative_errors(model: nn.Module, tested: RowFunction, expected: RowFunction) -> RelativeErrors:
    """Return the relative errors of the values and gradients of `tested`, compared to `expected`.

    Both functions take the model, and run in training mode with dropout disabled.
    """
    with mode_without_dropout(model, training=True), perturbed_parameters(model):
        expected_values, expected_gradients = _values_and_gradients(model, expected)
        values, gradients = _values_and_gradients(model, tested)
        return RelativeErrors(
            max_value_error(values, expected_values),
            _max_gradient_error(gradients, expected_gradients),
        )


def _values_and_gradients(model: nn.Module, function: RowFunction) -> tuple[mx.array, Arrays]:
    """Return the output of `function`, and the gradients of a random weighted sum of the output.

    The gradients, by parameter name, are empty if the model has no trainable parameters.
    """

    def weighted_sum(model: nn.Module) -> tuple[mx.array, mx.array]:
        values = function(model).astype(mx.float32)
        return (values * mx.random.normal(values.shape, key=mx.random.key(SEED))).sum(), values

    if not named_arrays(model.trainable_parameters()):
        return function(model), {}
    (_, values), gradients = value_and_grad(model, weighted_sum)(model)
    mx.eval(values, gradients)
    return values, named_arrays(gradients)


def max_value_error(values: mx.array, expected: mx.array) -> float:
    """Return the largest error among the rows of `values`, relative to the expected row's norm."""
    values, expected = values.astype(mx.float32), expected.astype(mx.float32)
    norms = mx.linalg.norm(expected, axis=-1)
    return _max_or_nan(scalar(row) for row in mx.linalg.norm(values - expected, axis=-1) / norms)


def _max_gradient_error(gradients: Arrays, expected: Arrays) -> float:
    """Return the largest relative error of any parameter's gradient.

    The result is 0 if there are no gradients, and NaN if all expected gradients are zero.
    """
    if not expected:
        return 0.0
    norms = {name: _norm(value) for name, value in expected.items()}
    minimum = MIN_NORM_SHARE * _max_or_nan(norms.values())
    if minimum == 0:
        return float("nan")
    return _max_or_nan(
        _norm(gradients[name] - expected[name]) / max(norm, minimum) for name, norm in norms.items()
    )


def _max_or_nan(values: Iterable[float]) -> float:
    """Return the maximum, or NaN if any value is NaN. (Python's `max` may ignore NaN.)"""
    return float(np.max(list(values)))


def _norm(value: mx.array) -> float:
    """Return the Euclidean norm of an array."""
    return scalar(mx.linalg.norm(value.astype(mx.float32)))


@contextmanager
def perturbed_parameters(model: nn.Module) -> Iterator[None]:
    """Set trainable parameters that are all zero to random values inside the block.

    LoRA initializes its matrix B with zeros. The gradient of its matrix A is then zero, and errors
    in that gradient would not show.
    """
    before = model.trainable_parameters()
    key = mx.random.key(SEED)

    def perturb(value: mx.array) -> mx.array:
        nonlocal key
        if scalar(mx.any(value)):
            return value
        key, parameter_key = mx.random.split(key)
        noise = PERTURBATION * mx.random.normal(value.shape, key=parameter_key)
        return noise.astype(value.dtype)

    model.update(tree_map(perturb, before))
    try:
        yield
    finally:
        model.update(before)
