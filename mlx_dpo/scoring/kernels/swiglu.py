"""silu(gate) * x with its own gradient, for the CPU, where MLX's sigmoid sets a step's pace."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from mlx_dpo.models.device import on_cpu

FUNCTION_NAME = "swiglu"


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) x. Shape of both"""
    if gate.dtype != mx.float32:  # 1 / e in 16 bits is off by up to 0.2 %, its powers by more
        return activations.swiglu(gate, x)
    # Where the power is infinite, the gate is shut.
    opened = 1 / (1 + mx.power(1 / math.e, mx.stop_gradient(gate)))
    return cast(mx.array, _swiglu(gate, x, opened))


@mx.custom_function
def _swiglu(gate: mx.array, x: mx.array, opened: mx.array) -> mx.array:
    return gate * opened * x


@_swiglu.vjp
def _swiglu_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    """With s = sigmoid(g):  d(g s x) = s x (1 + g (1 - s)) dg + g s dx."""
    gate, x, opened = primals
    through = cotangent * opened
    return through * x * (1 + gate * (1 - opened)), through * gate, mx.zeros_like(opened)


@contextmanager
def use_fast_swiglu(model: nn.Module) -> Iterator[None]:
    """Inside the block, on the CPU, mlx-lm's `swiglu` is ours in the source files of `model`."""
    parts = model.modules() if isinstance(model, nn.Module) and on_cpu() else []
    sources = {sys.modules[type(part).__module__] for part in parts}
    changed = [s for s in sources if getattr(s, FUNCTION_NAME, None) is activations.swiglu]
    for source in changed:
        setattr(source, FUNCTION_NAME, swiglu)
    try:
        yield
    finally:
        for source in changed:
            setattr(source, FUNCTION_NAME, activations.swiglu)
