"""Train hybrid models: replace mlx-lm's gated delta rule by MLX's fused operation.

During training, mlx-lm computes this recurrence in a Python loop over the tokens, whose graph is
as long as the text. mlx-lm's Metal kernel has no gradient. `mx.fast.gated_delta_update` computes
the same recurrence in one operation that has a gradient.

Shape letters: B sequences, T tokens, K key heads, H value heads, D width of keys, E width of
values.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta

from mlx_dpo.models.restore import patched

FUNCTION_NAME = "gated_delta_update"

Update = Callable[..., tuple[mx.array, mx.array]]  # output and state


@contextmanager
def use_fused_gated_delta(model: nn.Module) -> Iterator[int]:
    """Make the gated-delta layers of the model use MLX's fused recurrence inside the block.

    Training and evaluation mode both use it, so that policy and reference are computed by the same
    operations. Layers with a gate per channel (Kimi's) keep mlx-lm's recurrence. Outputs of masked
    tokens are zero. The function is replaced in mlx-lm's Python modules, which affects every model
    of the same type.

    Yields:
        The number of Python modules changed: 0 for models without gated-delta layers.
    """
    modules = [module for module in _source_modules(model) if FUNCTION_NAME in vars(module)]
    with ExitStack() as stack:
        for module in modules:
            fused = _with_fused_recurrence(vars(module)[FUNCTION_NAME])
            stack.enter_context(patched(module, FUNCTION_NAME, fused))
        yield len(modules)


def _source_modules(model: nn.Module) -> set[ModuleType]:
    """Return the Python modules that define the classes of the model's submodules."""
    classes = {base for _, part in model.named_modules() for base in type(part).__mro__}
    return {sys.modules[base.__module__] for base in classes}


def _with_fused_recurrence(update: Update) -> Update:
    """Return a function that computes `update`, with MLX's fused recurrence where possible.

    The fused recurrence needs gates of one number per head. For gates per channel, `update` is
    called.
    """

    def fused(
        q: mx.array,  # (B, T, K, D)
        k: mx.array,  # (B, T, K, D)
        v: mx.array,  # (B, T, H, E)
        a: mx.array,  # (B, T, H), or (B, T, H, D) with a gate per channel
        b: mx.array,  # (B, T, H)
        *rest: Any,
        **options: Any,
    ) -> tuple[mx.array, mx.array]:
        if a.ndim > b.ndim:
            return update(q, k, v, a, b, *rest, **options)
        gate, beta, state, mask = _recurrence_inputs(a, b, *rest, **options)
        # In float32, as mlx-lm computes. Given mixed dtypes, MLX takes the gate in the narrowest
        # one, and bfloat16 rounds a decay of 0.999 to 1: no decay at all.
        arrays = [array.astype(mx.float32) for array in (q, k, v, gate, beta)]
        recurrence: Any = mx.fast.gated_delta_update
        out, state = recurrence(*arrays, state, mask)
        return out.astype(q.dtype), state

    return fused


def _recurrence_inputs(  # noqa: PLR0913 (mlx-lm's own signature)
    a: mx.array,
    b: mx.array,
    A_log: mx.array,  # noqa: N803 (mlx-lm's name, usable as a keyword)
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,  # ignored: MLX's recurrence has a gradient in every mode
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array, mx.array | None, mx.array | None]:
    """Return decay gate and write strength beta, (B, T, H) each, then `state` and `mask`."""
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    if lower_bound is None:
        return gated_delta.compute_g(A_log, a, dt_bias), beta, state, mask
    return gated_delta.compute_lower_bound_g(A_log, a, dt_bias, lower_bound), beta, state, mask
