"""Gradient checkpointing: layers save only their inputs and run again in the backward pass.

This module is also correct where mlx-lm's own `grad_checkpoint` silently gives wrong gradients. In
a function that MLX runs twice,

* trainable parameters must be arguments, because a captured array gets no gradient;
* caches must be copies that are returned as results, because the second run would write into them
  again;
* random numbers (dropout) must be the same in both runs.

Only the given layers are changed, not their class. Every callable layer is supported, without code
per architecture.
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
from mlx_dpo.models.restore import preserved_random_state


@dataclass(frozen=True)
class _ArrayIndex:
    """Placeholder for an array, with the array's index in `FlattenedArguments.arrays`."""

    index: int


@dataclass(frozen=True)
class _ObjectIndex:
    """Placeholder for an object such as a cache: its index in `FlattenedArguments.objects`."""

    index: int


class FlattenedArguments:
    """A layer's arguments, separated into a list of arrays and a list of objects such as caches.

    MLX differentiates functions of arrays only. The arrays in the attributes of the objects are in
    the list too. An object that occurs several times is stored once.
    """

    def __init__(self, objects: Sequence[Any] = ()) -> None:
        """Store `objects` and the arrays in their attributes; `flatten` may add more of both."""
        self.arrays: list[mx.array] = []
        self.objects: list[Any] = []
        self.states: list[Any] = []  # structure of the attributes of each object
        self._constants: set[int] = set()  # indices of arrays of objects that declare them so
        for known in objects:
            self._index(known)
        self._flatten_states()

    def flatten(self, tree: Any) -> Any:
        """Store the arrays and objects of `tree`; return `tree` with placeholders in their place.

        `tree` consists of nested lists, tuples and dicts. `RebuiltArguments.unflatten` replaces
        the placeholders again.
        """
        structure = self._flatten(tree)
        self._flatten_states()
        return structure

    def _flatten(self, value: Any) -> Any:
        """Return `value` with its arrays and objects replaced by placeholders."""
        if isinstance(value, mx.array):
            self.arrays.append(value)
            return _ArrayIndex(len(self.arrays) - 1)
        if isinstance(value, nn.Module):
            return _check_frozen(value)
        if isinstance(value, dict):
            return {key: self._flatten(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return _same_type(value, [self._flatten(item) for item in value])
        if hasattr(value, "__dict__") and not callable(value):
            return _ObjectIndex(self._index(value))
        return value

    def _index(self, value: Any) -> int:
        """Return the index of an object in `objects`; append the object if it is new."""
        for index, known in enumerate(self.objects):
            if known is value:
                return index
        self.objects.append(value)
        return len(self.objects) - 1

    def _flatten_states(self) -> None:
        """Store the arrays in the attributes of every object in `objects`.

        Objects found among these attributes are appended to `objects` and treated the same.
        """
        while len(self.states) < len(self.objects):
            self.states.append(None)  # reserves the index: attributes may add objects
            target, start = self.objects[len(self.states) - 1], len(self.arrays)
            self.states[-1] = self._flatten(vars(target))
            if getattr(type(target), "HAS_CONSTANT_ARRAYS", False):
                self._constants.update(range(start, len(self.arrays)))

    def variable_indices(self) -> list[int]:
        """Return the indices of the arrays that may need a gradient."""
        return [i for i in floating_indices(self.arrays) if i not in self._constants]


class RebuiltArguments:
    """A layer's arguments in their original form, with other arrays instead of the original."""

    def __init__(
        self,
        flattened: FlattenedArguments,
        arrays: Sequence[mx.array],
        into: Sequence[Any] | None = None,
    ) -> None:
        """Rebuild the arguments `flattened` with `arrays` instead of the stored arrays.

        Args:
            into: objects whose attributes are set; None creates new objects of the same types.
        """
        self.arrays = arrays
        if into is None:
            into = [object.__new__(type(original)) for original in flattened.objects]
        # Objects that the layer itself created are not shared with anyone: they are reused.
        self.objects = [*into, *flattened.objects[len(into) :]]
        for target, state in zip(self.objects, flattened.states, strict=True):
            vars(target).update(self.unflatten(state))

    def unflatten(self, structure: Any) -> Any:
        """Return `structure` with its placeholders replaced by the arrays and objects."""
        if isinstance(structure, _ArrayIndex):
            return self.arrays[structure.index]
        if isinstance(structure, _ObjectIndex):
            return self.objects[structure.index]
        if isinstance(structure, nn.Module):
            return structure
        if isinstance(structure, dict):
            return {key: self.unflatten(item) for key, item in structure.items()}
        if isinstance(structure, list | tuple):
            return _same_type(structure, [self.unflatten(item) for item in structure])
        return structure


def _same_type(original: Any, items: list[Any]) -> Any:
    """Return `items` as a list, tuple or named tuple of the same type as `original`."""
    sequence_type = type(original)
    return sequence_type(*items) if hasattr(original, "_fields") else sequence_type(items)


def _check_frozen(module: nn.Module) -> nn.Module:
    """Check that a module passed to a layer as an argument is frozen; return the module.

    Raises:
        TypeError: the module has trainable parameters. MLX would treat them as constants of the
            function that it differentiates.
    """
    if tree_flatten(module.trainable_parameters()):
        raise TypeError(
            f"a `{type(module).__name__}` with trainable parameters is passed to a layer; "
            "its gradients would be lost"
        )
    return module


Call = Callable[..., Any]


class LayerResult(NamedTuple):
    """Result of a layer's call: its output and the caches after the call, both flattened."""

    flattened: FlattenedArguments
    output_structure: Any


class LayerCall:
    """A layer's call as a function of arrays, which can run several times with the same result."""

    def __init__(
        self, layer: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Prepare `call(layer, *args, **kwargs)`."""
        self.layer, self._call = layer, call
        self.arguments = FlattenedArguments()
        self._structure = self.arguments.flatten((args, kwargs))
        self.parameters = named_arrays(layer.trainable_parameters())
        self.random_state = mx.array(random_state())  # before the layer draws random numbers

    @property
    def inputs(self) -> list[mx.array]:
        """The trainable parameters, the arrays of the arguments, and the random state."""
        return [*self.parameters.values(), *self.arguments.arrays, self.random_state]

    def run(self, inputs: Sequence[mx.array]) -> LayerResult:
        """Call the layer with other arrays instead of `self.inputs`."""
        count = len(self.parameters)
        # Copies of the caches are written to, so that a second run starts from the same state.
        copies = RebuiltArguments(self.arguments, inputs[count:-1])
        args, kwargs = copies.unflatten(self._structure)
        parameters = dict(zip(self.parameters, inputs[:count], strict=True))
        with _with_parameters(self.layer, parameters):
            output = self._call(self.layer, *args, **kwargs)
        flattened = FlattenedArguments(copies.objects)
        return LayerResult(flattened, flattened.flatten(output))

    def finish(self, result: LayerResult, arrays: Sequence[mx.array]) -> Any:
        """Return the output of the call, and write the new state to the original caches.

        Args:
            arrays: the arrays of `result`, or others to use instead.
        """
        rebuilt = RebuiltArguments(result.flattened, arrays, into=self.arguments.objects)
        return rebuilt.unflatten(result.output_structure)


@contextmanager
def gradient_checkpointing(
    model: nn.Module, layers: Sequence[nn.Module] | None = None
) -> Iterator[set[int]]:
    """Make `layers` save only their inputs for the backward pass inside the block.

    The backward pass runs the layers again, which costs an additional forward pass. Values,
    gradients, caches, random numbers and parameter names stay the same. Parameters that are
    trainable when a layer is called get gradients.

    Args:
        layers: layers to checkpoint; None means all layers of the model.

    Yields:
        The set of indices of the layers called so far. It stays empty, and no memory is saved,
        for a model that calls the submodules of its layers directly.

    Raises:
        RuntimeError: a layer is checkpointed already.
    """
    selected = list({id(layer): layer for layer in layers or model.layers}.values())
    if any(hasattr(type(layer), "_checkpointed") for layer in selected):
        raise RuntimeError("these layers are checkpointed already; blocks do not nest")
    called: set[int] = set()
    for index, layer in enumerate(selected):
        layer.__class__ = _checkpointed_class(type(layer), partial(called.add, index))
    try:
        yield called
    finally:
        for layer in selected:
            layer.__class__ = type(layer).__bases__[0]


def _checkpointed_class(layer_class: type, note_call: Callable[[], None]) -> type:
    """Return a subclass of `layer_class` whose `__call__` is checkpointed.

    Each call first calls `note_call`. A subclass is needed because Python looks up `__call__` on
    the class only.
    """

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        note_call()
        return _checkpointed_call(self, layer_class.__call__, args, kwargs)

    members = {"__call__": __call__, "__module__": layer_class.__module__, "_checkpointed": True}
    return type(layer_class.__name__, (layer_class,), members)


def _checkpointed_call(
    layer: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return `call(layer, *args, **kwargs)`, saving only its input arrays for the backward pass."""
    layer_call = LayerCall(layer, call, args, kwargs)
    arrays, result = _run_with_recomputation(layer_call.run, layer_call.inputs)
    return layer_call.finish(result, arrays)


def _run_with_recomputation(
    run: Callable[[Sequence[mx.array]], LayerResult], inputs: list[mx.array]
) -> tuple[list[mx.array], LayerResult]:
    """Return the output arrays and the result of `run(inputs)`; save only `inputs`.

    The backward pass calls `run` again.

    Args:
        inputs: arrays with respect to which MLX differentiates; the last one is the random state.
    """
    results: list[LayerResult] = []

    @mx.custom_function
    def forward(*arrays: mx.array) -> list[mx.array]:
        results.append(run(arrays))
        return results[-1].flattened.arrays

    @forward.vjp
    def backward(
        arrays: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> list[mx.array]:
        # The recomputation must wait for the incoming gradient. MLX promises no order, and
        # recomputing early would hold the activations of all layers at once.
        arrays = mx.depends(list(arrays), list(cotangents))
        return recomputed_gradients(run, arrays, cotangents, outputs)

    outputs: Any = forward(*inputs)
    floating = set(floating_indices(outputs))
    # Integers, such as offsets of a cache, may later be used as indices, and MLX refuses to
    # differentiate with respect to indices.
    arrays = [o if i in floating else mx.stop_gradient(o) for i, o in enumerate(outputs)]
    return arrays, results.pop()


def recomputed_gradients(
    run: Callable[[Sequence[mx.array]], LayerResult],
    inputs: Sequence[mx.array],
    cotangents: Sequence[mx.array],
    outputs: Sequence[mx.array],
) -> list[mx.array]:
    """Return the gradients of all `inputs` of a layer, which runs again. Integers get zeros.

    Args:
        inputs: the last one is the random state.
        cotangents: gradients of `outputs`, the arrays of the result of `run(inputs)`.
    """
    float_outputs, float_inputs = floating_indices(outputs), floating_indices(inputs)

    def recompute(*floats: mx.array) -> Sequence[mx.array]:
        merged = list(inputs)
        for index, value in zip(float_inputs, floats, strict=True):
            merged[index] = value
        recomputed = run(merged).flattened.arrays
        # `depends` makes them distinct arrays. Of an array that is returned twice, as keys
        # of a cache and as output of the layer, MLX would use one cotangent only.
        return mx.depends([recomputed[index] for index in float_outputs], [inputs[-1]])

    with preserved_random_state(inputs[-1]):
        _, float_gradients = mx.vjp(
            recompute,
            [inputs[index] for index in float_inputs],
            [cotangents[index] for index in float_outputs],
        )
    # Zeros, not None: MLX drops None, which shifts the gradients that follow.
    gradients = [mx.zeros_like(array) for array in inputs]
    for index, gradient in zip(float_inputs, float_gradients, strict=True):
        gradients[index] = gradient
    return gradients


def floating_indices(arrays: Sequence[mx.array]) -> list[int]:
    """Return the indices of the floating-point arrays: only these have gradients."""
    return [i for i, array in enumerate(arrays) if mx.issubdtype(array.dtype, mx.floating)]


@contextmanager
def _with_parameters(layer: nn.Module, arrays: Arrays) -> Iterator[None]:
    """Replace parameters of the layer by `arrays` inside the block, and restore them afterwards."""
    before = named_arrays(layer.parameters())
    layer.update(tree_unflatten(list(arrays.items())))
    try:
        yield
    finally:
        layer.update(tree_unflatten([(name, before[name]) for name in arrays]))
