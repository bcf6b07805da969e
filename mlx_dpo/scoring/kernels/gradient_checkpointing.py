"""Blocks that keep only their inputs, and are computed again for the backward pass.

Right also where mlx-lm's own `grad_checkpoint` is silently wrong: inside a function that MLX
recomputes, caches are copies and come out as results, trainable parameters are arguments
(a captured array gets no gradient), and random numbers are drawn as the first time. Single
blocks change, not their class. Knows any block that is called; nothing of architectures.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dpo.io.arrays import Arrays, named_arrays, random_state


@dataclass(frozen=True)
class _ArrayIndex:
    index: int


@dataclass(frozen=True)
class _ObjectIndex:
    index: int


class FlattenedArguments:
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
            return _ArrayIndex(len(self.arrays) - 1)
        if isinstance(value, nn.Module):
            return _check_frozen(value)
        if isinstance(value, dict):
            return {key: self._take(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return _same_type(value, [self._take(item) for item in value])
        if hasattr(value, "__dict__") and not callable(value):
            return _ObjectIndex(self._number(value))
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


class RebuiltArguments:
    """What was captured, around other arrays."""

    def __init__(
        self,
        captured: FlattenedArguments,
        arrays: Sequence[mx.array],
        into: Sequence[Any] | None = None,
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
        if isinstance(shape, _ArrayIndex):
            return self.arrays[shape.index]
        if isinstance(shape, _ObjectIndex):
            return self.objects[shape.index]
        if isinstance(shape, nn.Module):
            return shape
        if isinstance(shape, dict):
            return {key: self.put(item) for key, item in shape.items()}
        if isinstance(shape, list | tuple):
            return _same_type(shape, [self.put(item) for item in shape])
        return shape


def _same_type(original: Any, items: list[Any]) -> Any:
    kind = type(original)
    return kind(*items) if hasattr(original, "_fields") else kind(items)


def _check_frozen(module: nn.Module) -> nn.Module:
    """A module passed as an argument counts as a constant, so it must be one."""
    if tree_flatten(module.trainable_parameters()):
        raise TypeError(
            f"a `{type(module).__name__}` with trainable parameters is passed to a block; "
            "its gradients would be lost"
        )
    return module


Call = Callable[..., Any]


class _LayerResult(NamedTuple):
    """What a layer gave: its output and its caches as they then are."""

    taken: FlattenedArguments
    shape: Any  # of the output


@contextmanager
def gradient_checkpointing(
    model: nn.Module, layers: Sequence[nn.Module] | None = None
) -> Iterator[set[int]]:
    """Inside the block, gradients through `layers`, all of the model's if None, cost a second
    forward pass and keep no activation but the inputs of each layer.

    Values, gradients, caches, random numbers and parameter names are as outside. Gradients
    reach the parameters that are trainable when a layer is called.

    Yields:
        The positions of the layers that were called so far. It stays empty with a model that
        calls the parts of its layers one by one: nothing is saved there.

    Raises:
        RuntimeError: a layer is recomputed already.
    """
    chosen = list({id(layer): layer for layer in layers or model.layers}.values())
    if any(hasattr(type(layer), "_recomputed_call") for layer in chosen):
        raise RuntimeError("these layers are recomputed already; blocks do not nest")
    called: set[int] = set()
    for position, layer in enumerate(chosen):
        layer.__class__ = _checkpointed_class(type(layer), partial(called.add, position))
    try:
        yield called
    finally:
        for layer in chosen:
            layer.__class__ = type(layer).__bases__[0]


def _checkpointed_class(kind: type, note: Callable[[], None]) -> type:
    """The class with another `__call__`: Python looks it up on the class, not on the object."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        note()
        return _checkpointed_call(self, kind.__call__, args, kwargs)

    members = {"__call__": __call__, "__module__": kind.__module__, "_recomputed_call": True}
    return type(kind.__name__, (kind,), members)


def _checkpointed_call(
    layer: nn.Module, plain: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`plain(layer, *args, **kwargs)`, of which only arrays that go in are kept."""
    given = FlattenedArguments()
    call = given.take((args, kwargs))
    parameters = named_arrays(layer.trainable_parameters())
    count = len(parameters)
    key = mx.array(random_state())  # as it is before the layer draws

    def run(arrays: Sequence[mx.array]) -> _LayerResult:
        inside = RebuiltArguments(given, arrays[count:-1])
        inner_args, inner_kwargs = inside.put(call)
        with _with_parameters(layer, dict(zip(parameters, arrays[:count], strict=True))):
            out = plain(layer, *inner_args, **inner_kwargs)
        taken = FlattenedArguments(inside.objects)
        return _LayerResult(taken, taken.take(out))

    arrays, result = _run_with_recomputation(run, [*parameters.values(), *given.arrays, key])
    return RebuiltArguments(result.taken, arrays, into=given.objects).put(result.shape)


def _run_with_recomputation(
    run: Callable[[Sequence[mx.array]], _LayerResult], inputs: list[mx.array]
) -> tuple[list[mx.array], _LayerResult]:
    """`run(inputs)`, whose backward pass runs it again; the last input is the random state."""
    results: list[_LayerResult] = []

    @mx.custom_function
    def forward(*arrays: mx.array) -> list[mx.array]:
        results.append(run(arrays))
        return results[-1].taken.arrays

    @forward.vjp
    def backward(
        arrays: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> list[mx.array]:
        # The second run waits for the gradient that asks for it; MLX promises no order.
        arrays = mx.depends(list(arrays), list(cotangents))
        wanted, sought = _floating_indices(outputs), _floating_indices(arrays)

        def again(*floats: mx.array) -> Sequence[mx.array]:
            merged = list(arrays)
            for index, value in zip(sought, floats, strict=True):
                merged[index] = value
            found = run(merged).taken.arrays
            # As arrays of their own: of one that comes out twice, as a cache's keys and as what
            # the layer returns, MLX would take the gradient once.
            return mx.depends([found[index] for index in wanted], [arrays[-1]])

        with _random_state(arrays[-1]):
            _, found = mx.vjp(
                again, [arrays[index] for index in sought], [cotangents[i] for i in wanted]
            )
        # Not None: MLX leaves those out, and the gradients after them move up.
        gradients = [mx.zeros_like(array) for array in arrays]
        for index, gradient in zip(sought, found, strict=True):
            gradients[index] = gradient
        return gradients

    outputs: Any = forward(*inputs)
    floating = set(_floating_indices(outputs))
    # Whole numbers, such as a cache's offsets, may index later on, where MLX refuses gradients.
    constant = [o if i in floating else mx.stop_gradient(o) for i, o in enumerate(outputs)]
    return constant, results.pop()


def _floating_indices(arrays: Sequence[mx.array]) -> list[int]:
    """Which of them can have a gradient."""
    return [i for i, array in enumerate(arrays) if mx.issubdtype(array.dtype, mx.floating)]


@contextmanager
def _with_parameters(layer: nn.Module, arrays: Arrays) -> Iterator[None]:
    """The layer with these parameters inside the block, its own afterwards."""
    before = named_arrays(layer.parameters())
    layer.update(tree_unflatten(list(arrays.items())))
    try:
        yield
    finally:
        layer.update(tree_unflatten([(name, before[name]) for name in arrays]))


@contextmanager
def _random_state(key: mx.array) -> Iterator[None]:
    """Random numbers as they follow on `key` inside the block; outside nothing was drawn."""
    before = mx.array(random_state())
    random_state()[:] = key
    try:
        yield
    finally:
        random_state()[:] = before
