"""Context managers that undo temporary changes: replaced attributes, module modes, random state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.io.arrays import random_state


@contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replace the attribute `name` of `module` by `value` inside the `with` block.

    Blocks can be nested: at its end, each block restores the value that it found. The replacement
    is visible to all threads.
    """
    replaced = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, replaced)


@contextmanager
def module_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of every module after the `with` block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # `train` sets a whole subtree; `modules` lists parents before their children.
        for module, is_training in modes:
            module.train(is_training)


@contextmanager
def preserved_random_state(start: mx.array | None = None) -> Iterator[None]:
    """Restore MLX's random state after the `with` block.

    Args:
        start: Random state for the beginning of the block; None keeps the current state.
    """
    before = mx.array(random_state())
    if start is not None:
        random_state()[:] = start
    try:
        yield
    finally:
        random_state()[:] = before
