"""Whether two ways to compute the same thing agree: in value, and in gradient.

Values are rows of numbers, gradients those of a fixed random sum of them with respect to the
model's trainable parameters. The model is left as it was.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_dpo.arrays import Arrays, flat, scalar
from mlx_dpo.types import TokenizedPair

Rows = Callable[[nn.Module], mx.array]  # (n, K), whatever K is
SEED = 0
STIR = 0.02  # about the size of a trained adapter's weights
SMALL = 0.01  # a gradient below this share of the largest is measured against that share


class Errors(NamedTuple):
    """The largest relative difference of a row, and of a trainable parameter's gradient."""

    values: float
    gradients: float  # 0 where nothing is trainable


def random_pairs(shapes: Sequence[tuple[int, int, int]], vocab_size: int) -> list[TokenizedPair]:
    """Pairs of random ids; a shape is the lengths of prompt, chosen and rejected."""
    rng = np.random.default_rng(SEED)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, length).tolist())

    return [TokenizedPair(ids(p), ids(c), ids(r)) for p, c, r in shapes]


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """In training or evaluation mode, which select kernels, and without dropout either way."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        for module, mode in before:  # parents come first: each sets all that is below it
            module.train(mode)


def value_error(model: nn.Module, fast: Rows, oracle: Rows) -> float:
    """The largest difference of a row in evaluation mode, relative to the row."""
    with in_mode(model, training=False):
        return _value_error(fast(model), oracle(model))


def errors(model: nn.Module, fast: Rows, oracle: Rows) -> Errors:
    """How far `fast` is from `oracle` in training mode, with dropout switched off."""
    with in_mode(model, training=True), _stirred(model):
        expected, slopes = _with_gradients(model, oracle)
        found, found_slopes = _with_gradients(model, fast)
        return Errors(_value_error(found, expected), _gradient_error(found_slopes, slopes))


def _with_gradients(model: nn.Module, rows: Rows) -> tuple[mx.array, Arrays]:
    def weighed(model: nn.Module) -> tuple[mx.array, mx.array]:
        values = rows(model).astype(mx.float32)
        return (values * mx.random.normal(values.shape, key=mx.random.key(SEED))).sum(), values

    if not flat(model.trainable_parameters()):
        return rows(model), {}
    (_, values), gradients = nn.value_and_grad(model, weighed)(model)
    mx.eval(values, gradients)
    return values, flat(gradients)


def _value_error(found: mx.array, expected: mx.array) -> float:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    norms = mx.linalg.norm(expected, axis=-1)
    return _largest(scalar(row) for row in mx.linalg.norm(found - expected, axis=-1) / norms)


def _gradient_error(found: Arrays, expected: Arrays) -> float:
    """The largest relative difference of a parameter's gradient; nan if all of them are zero."""
    if not expected:
        return 0.0
    norms = {name: _norm(value) for name, value in expected.items()}
    least = SMALL * _largest(norms.values())
    if least == 0:
        return float("nan")
    return _largest(
        _norm(found[name] - expected[name]) / max(norm, least) for name, norm in norms.items()
    )


def _largest(values: Iterable[float]) -> float:
    """The maximum, or nan if there is one: Python's own keeps or loses it as the order wants."""
    return float(np.max(list(values)))


def _norm(value: mx.array) -> float:
    return scalar(mx.linalg.norm(value.astype(mx.float32)))


@contextmanager
def _stirred(model: nn.Module) -> Iterator[None]:
    """Trainable weights that are all zero get random ones: LoRA's B hides the gradient of its A."""
    before = model.trainable_parameters()
    key = mx.random.key(SEED)

    def stir(value: mx.array) -> mx.array:
        nonlocal key
        if scalar(mx.any(value)):
            return value
        key, own = mx.random.split(key)
        return (STIR * mx.random.normal(value.shape, key=own)).astype(value.dtype)

    model.update(tree_map(stir, before))
    try:
        yield
    finally:
        model.update(before)
