"""Hybrid models in training: mlx-lm's gated-delta recurrence through MLX's own, fused one.

In training mlx-lm steps through the tokens in Python, a graph as long as the text; its kernel
for Metal has no gradient. `mx.fast.gated_delta_update` is the same recurrence with both.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta

FUNCTION_NAME = "gated_delta_update"

Update = Callable[..., tuple[mx.array, mx.array]]


@contextmanager
def use_fused_gated_delta(model: nn.Module) -> Iterator[int]:
    """Inside the block the model's gated-delta layers use MLX's fused recurrence.

    In training and evaluation mode alike, so that policy and reference are computed by the
    same steps. Layers with a gate for each channel (Kimi's) stay with mlx-lm's. Outputs under a
    mask are zero. The model's source files are changed, hence every model of its type is.

    Yields:
        How many source files of the model use the recurrence: 0 for most models.
    """
    changed = {
        module: vars(module)[FUNCTION_NAME]
        for module in _source_modules(model)
        if FUNCTION_NAME in vars(module)
    }
    for module, update in changed.items():
        setattr(module, FUNCTION_NAME, _with_fused_recurrence(update))
    try:
        yield len(changed)
    finally:
        for module, update in changed.items():
            setattr(module, FUNCTION_NAME, update)


def _source_modules(model: nn.Module) -> set[ModuleType]:
    """The Python modules in which the model's parts are written; they import the name."""
    kinds = {kind for _, part in model.named_modules() for kind in type(part).__mro__}
    return {sys.modules[kind.__module__] for kind in kinds}


def _with_fused_recurrence(update: Update) -> Update:
    """`update` with the recurrence replaced where the gate is one number for each head."""

    def fused(
        q: mx.array,  # (B, T, K, D)
        k: mx.array,
        v: mx.array,  # (B, T, H, E)
        a: mx.array,  # (B, T, H), or (B, T, H, D) with a gate for each channel
        b: mx.array,
        *rest: Any,
        **options: Any,
    ) -> tuple[mx.array, mx.array]:
        if a.ndim > b.ndim:
            return update(q, k, v, a, b, *rest, **options)
        gate, beta, state, mask = _recurrence_inputs(a, b, *rest, **options)
        # In float32, as mlx-lm computes: of mixed types MLX takes the gate in the smallest, and
        # bfloat16 rounds a decay of 0.999 to no decay at all.
        arrays = [array.astype(mx.float32) for array in (q, k, v, gate, beta)]
        recurrence: Any = mx.fast.gated_delta_update
        out, state = recurrence(*arrays, state, mask)
        return out.astype(q.dtype), state

    return fused


def _recurrence_inputs(  # noqa: PLR0913 (mlx-lm's own signature)
    a: mx.array,
    b: mx.array,
    A_log: mx.array,  # noqa: N803 (mlx-lm's name, by which it may be given)
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,  # always: this kernel has a gradient
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array, mx.array | None, mx.array | None]:
    """What is kept and what is learned at each step, both (B, T, H); and state and mask."""
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    if lower_bound is None:
        return gated_delta.compute_g(A_log, a, dt_bias), beta, state, mask
    return gated_delta.compute_lower_bound_g(A_log, a, dt_bias, lower_bound), beta, state, mask
