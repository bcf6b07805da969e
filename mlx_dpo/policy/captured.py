"""Arguments with caches in them taken apart into arrays and the rest, and put together again.

A function that MLX differentiates sees only arrays. The caches of mlx-lm are objects that
hold arrays beside offsets and lists, and that a call changes in place: here such an object
becomes its arrays and a description from which a copy with other arrays can be made. Knows
nothing of any cache's class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


@dataclass(frozen=True)
class _Array:
    index: int


@dataclass(frozen=True)
class _Object:
    index: int


class Captured:
    """Trees taken apart: their arrays, and their objects in the order in which they were met."""

    def __init__(self, objects: Sequence[Any] = ()) -> None:
        """Begin with `objects`, whose state is taken first; others follow as they are met."""
        self.arrays: list[mx.array] = []
        self.objects: list[Any] = []
        self.states: list[Any] = []
        for found in objects:
            self._number(found)
        self._take_states()

    def take(self, tree: Any) -> Any:
        """What is left of a tree without its arrays: the shape that `Rebuilt` fills again."""
        shape = self._take(tree)
        self._take_states()
        return shape

    def _take(self, value: Any) -> Any:
        if isinstance(value, mx.array):
            self.arrays.append(value)
            return _Array(len(self.arrays) - 1)
        if isinstance(value, nn.Module):
            return _without_trainables(value)
        if isinstance(value, dict):
            return {key: self._take(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return _like(value, [self._take(item) for item in value])
        if hasattr(value, "__dict__") and not callable(value):
            return _Object(self._number(value))
        return value

    def _number(self, found: Any) -> int:
        for index, known in enumerate(self.objects):
            if known is found:
                return index
        self.objects.append(found)
        return len(self.objects) - 1

    def _take_states(self) -> None:
        while len(self.states) < len(self.objects):
            self.states.append(None)  # numbered before its parts, which may be new objects
            self.states[-1] = self._take(vars(self.objects[len(self.states) - 1]))


class Rebuilt:
    """What was captured, around other arrays."""

    def __init__(
        self, captured: Captured, arrays: Sequence[mx.array], into: Sequence[Any] | None = None
    ) -> None:
        """Fill copies of the captured objects, or the objects `into` themselves."""
        self.arrays = arrays
        if into is None:
            into = [object.__new__(type(found)) for found in captured.objects]
        # An object that the call made itself is nobody else's: it stays what it is.
        self.objects = [*into, *captured.objects[len(into) :]]
        for target, state in zip(self.objects, captured.states, strict=True):
            vars(target).update(self.put(state))

    def put(self, shape: Any) -> Any:
        """The tree of this shape."""
        if isinstance(shape, _Array):
            return self.arrays[shape.index]
        if isinstance(shape, _Object):
            return self.objects[shape.index]
        if isinstance(shape, nn.Module):
            return shape
        if isinstance(shape, dict):
            return {key: self.put(item) for key, item in shape.items()}
        if isinstance(shape, list | tuple):
            return _like(shape, [self.put(item) for item in shape])
        return shape


def _like(original: Any, items: list[Any]) -> Any:
    kind = type(original)
    return kind(*items) if hasattr(original, "_fields") else kind(items)


def _without_trainables(module: nn.Module) -> nn.Module:
    """A module passed as an argument counts as a constant, so it must be one."""
    if tree_flatten(module.trainable_parameters()):
        raise TypeError(
            f"a `{type(module).__name__}` with trainable parameters is passed to a block; "
            "its gradients would be lost"
        )
    return module
