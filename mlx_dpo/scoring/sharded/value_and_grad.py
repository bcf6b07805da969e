"""Gradients of a function of a sharded model, computed block by block.

MLX would compute all gradients in one graph, in which the weights of all blocks would have to be
gathered. Here the function runs once to record the calls of the blocks. Then it runs again with the
recorded outputs of the blocks as constants, which gives the gradients of the last outputs. From
there each block runs again with its weights, in reverse order, as with gradient checkpointing.
What the model computes between blocks is repeated in the same way. The numbers are those of
`nn.value_and_grad` with gradient checkpointing, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_dpo.io.arrays import named_arrays, random_state
from mlx_dpo.models.restore import preserved_random_state
from mlx_dpo.models.sharded.shard_model import ModelShards, find_shards
from mlx_dpo.scoring.kernels.gradient_checkpointing import (
    LayerCall,
    LayerResult,
    floating_indices,
    recomputed_gradients,
)
from mlx_dpo.scoring.sharded.gathered_blocks import (
    Tape,
    fresh,
    gathers_weights,
    is_sharded,
    run_gathered,
    unsharded,
)


def value_and_grad(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what `nn.value_and_grad` does, also for a sharded model.

    `function` returns a scalar, or a tuple of it and other results. With a sharded model all ranks
    must call the returned function equally often, and get evaluated arrays.
    """
    shards = find_shards(model)
    if shards is None or not is_sharded(model):
        return nn.value_and_grad(model, function)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return _BlockwiseGradient(model, shards, lambda: function(*args, **kwargs)).compute()

    return run


class _Output(NamedTuple):
    """An output of a block: the number of the call, and the number of the array in its outputs."""

    call: int
    array: int


# What a gradient belongs to: an output of a block, the number of another input of a block, or the
# name of a trainable parameter.
_Key = _Output | int | str


class _RecordedCall(NamedTuple):
    """A call of a block with its result, and the random state afterwards."""

    call: LayerCall
    keys: list[_Key | None]  # of the arrays of the arguments; None if they need no gradient
    result: LayerResult
    random_state: mx.array

    @property
    def outputs(self) -> list[mx.array]:
        """The arrays that the call returned or wrote to caches."""
        return self.result.flattened.arrays


class _KnownArray(NamedTuple):
    """An array that was seen: the Python object, which the model may change, and its memory."""

    array: mx.array
    address: int
    key: _Key


class _Recorder:
    """Tape that runs each call of a block and records it.

    Attributes:
        calls: the recorded calls.
        first_use: for each input that is not an output of a block, the number of the first call.
    """

    def __init__(self, shards: ModelShards) -> None:
        self.calls: list[_RecordedCall] = []
        self.first_use: list[int] = []
        self._shards = shards
        self._known: dict[int, _KnownArray] = {}  # by id

    def call(self, layer_call: LayerCall) -> Any:
        """Run a call and record it."""
        arguments, number = layer_call.arguments, len(self.calls)
        mx.eval(arguments.arrays)
        variables = set(arguments.variable_indices())
        keys = [self._key(a) if i in variables else None for i, a in enumerate(arguments.arrays)]
        # The model may later write to the objects that it passed or got.
        arguments.arrays[:] = fresh(arguments.arrays)
        result = run_gathered(layer_call, self._shards)
        self.calls.append(_RecordedCall(layer_call, keys, result, mx.array(random_state())))
        returned = fresh(result.flattened.arrays)
        for index in result.flattened.variable_indices():
            self._remember(returned[index], _Output(number, index))
        return layer_call.finish(result, returned)

    def _key(self, array: mx.array) -> _Key:
        """Return the key of an input of the next call."""
        known = self._known.get(id(array))
        if known is not None and known.address == _address(array):
            return known.key
        self.first_use.append(len(self.calls))
        self._remember(array, len(self.first_use) - 1)
        return len(self.first_use) - 1

    def _remember(self, array: mx.array, key: _Key) -> None:
        self._known[id(array)] = _KnownArray(array, _address(array), key)


def _address(array: mx.array) -> int:
    """Return the address of the numbers of an evaluated array."""
    # NumPy has no bfloat16.
    words = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    view: Any = np.array(words, copy=False)
    return int(view.__array_interface__["data"][0])


class _InputsReachedError(Exception):
    """Exception that ends a repetition; carries the inputs of the call that it was to reach."""


class _Player:
    """Tape that returns the recorded outputs of each call, or arrays that stand for them."""

    def __init__(
        self, calls: Sequence[_RecordedCall], arrays: dict[_Key, mx.array], stop: int | None
    ) -> None:
        """Play `calls` up to the inputs of call `stop`; None plays them all."""
        self._calls, self._arrays, self._stop = calls, arrays, stop
        self._count = 0

    def call(self, layer_call: LayerCall) -> Any:
        """Return the output of the next call."""
        number = self._count
        if number == self._stop:
            raise _InputsReachedError(layer_call.arguments.arrays)
        recorded = self._calls[number]
        if recorded.call.layer is not layer_call.layer:
            raise RuntimeError("a repeated pass calls the blocks of the model in another order")
        self._count += 1
        random_state()[:] = recorded.random_state
        arrays = [
            self._arrays.get(_Output(number, index), array)
            for index, array in enumerate(fresh(recorded.outputs))
        ]
        return layer_call.finish(recorded.result, arrays)


class _BlockwiseGradient:
    """Computation of the value and the gradients of a function of a sharded model."""

    def __init__(self, model: nn.Module, shards: ModelShards, function: Callable[[], Any]) -> None:
        self._model, self._shards, self._function = model, shards, function
        self._start = mx.array(random_state())
        parameters = named_arrays(model.trainable_parameters())
        self._names = {id(array): name for name, array in parameters.items()}
        gathering = [block for block in shards.blocks if gathers_weights(block)]
        blocks = [named_arrays(block.trainable_parameters()) for block in gathering]
        inside = {id(array) for block in blocks for array in block.values()}
        self._outside = {k: v for k, v in parameters.items() if id(v) not in inside}
        self._calls: list[_RecordedCall] = []
        self._first_use: list[int] = []
        self._sums: dict[_Key, mx.array] = {}

    def compute(self) -> tuple[Any, Any]:
        """Return the value of the function, and the gradients of the trainable parameters."""
        recorder = _Recorder(self._shards)
        self._play(recorder)
        self._calls, self._first_use = recorder.calls, recorder.first_use
        del recorder  # it keeps all arrays that passed between blocks
        if not self._calls:
            raise RuntimeError("the model calls parts of its blocks, not the blocks")
        value = self._after_blocks()
        while self._calls:
            self._through_block()
            self._before_block()
            self._calls.pop()
        gradients = tree_map_with_path(
            lambda name, array: self._sums.get(name, mx.zeros_like(array)),
            self._model.trainable_parameters(),
        )
        mx.eval(gradients)
        return value, gradients

    def _play(self, tape: Tape) -> Any:
        """Return the result of the function, whose calls of blocks go to `tape`."""
        self._shards.tape = tape
        try:
            return self._function()
        finally:
            self._shards.tape = None

    def _after_blocks(self) -> Any:
        """Return the value of the function; add the gradients of what follows the blocks."""
        keys, arrays = self._constants(len(self._calls))
        touched: list[_Key] = []

        def run(values: list[mx.array]) -> Any:
            return self._repeat(_mark(keys, values, touched), stop=None)

        random_state()[:] = self._start
        value, gradients = mx.value_and_grad(run)(arrays)
        self._add({key: g for key, g in zip(keys, gradients, strict=True) if key in touched})
        mx.eval(value)
        return value

    def _through_block(self) -> None:
        """Run the last call again with gradients, and add those of its inputs."""
        number, recorded = len(self._calls) - 1, self._calls[-1]
        call, outputs = recorded.call, recorded.outputs
        cotangents = [self._sums.pop(_Output(number, i), None) for i in range(len(outputs))]
        if all(cotangent is None for cotangent in cotangents):
            return
        filled = [
            mx.zeros_like(array) if cotangent is None else cotangent
            for cotangent, array in zip(cotangents, outputs, strict=True)
        ]
        keys: list[_Key | None] = [self._names[id(array)] for array in call.parameters.values()]
        keys += [None if self._is_constant(key) else key for key in recorded.keys]
        with unsharded(call.layer, self._shards):
            gradients = recomputed_gradients(call.run, fresh(call.inputs), filled, outputs)
            pairs = [(k, g) for k, g in zip(keys, gradients[:-1], strict=True) if k is not None]
            del gradients
            mx.eval([gradient for _, gradient in pairs])
        for key, gradient in pairs:
            self._add({key: gradient})

    def _is_constant(self, key: _Key | None) -> bool:
        """Return whether no parameter is needed to compute the input with this key."""
        # What precedes the first block depends on parameters outside of the blocks only.
        return isinstance(key, int) and self._first_use[key] == 0 and not self._outside

    def _before_block(self) -> None:
        """Add the gradients of what is computed before the last call, after the one before it."""
        number, inputs = len(self._calls) - 1, self._calls[-1].keys
        new = {key: i for i, key in enumerate(inputs) if key in self._sums}
        new = {k: i for k, i in new.items() if isinstance(k, int) and self._first_use[k] == number}
        if not new:
            return
        keys, constants = self._constants(number)
        touched: list[_Key] = []

        def run(*values: mx.array) -> list[mx.array]:
            try:
                self._repeat(_mark(keys, values, touched), stop=number)
            except _InputsReachedError as reached:
                return [reached.args[0][index] for index in new.values()]
            raise RuntimeError("a repeated pass has fewer calls of blocks")

        with preserved_random_state(self._start):
            _, gradients = mx.vjp(run, constants, [self._sums.pop(key) for key in new])
            self._add({key: g for key, g in zip(keys, gradients, strict=True) if key in touched})

    def _constants(self, count: int) -> tuple[list[_Key], list[mx.array]]:
        """Return the keys and values of what the function depends on after `count` calls.

        These are the trainable parameters outside of the blocks and the outputs of the calls.
        """
        arrays: dict[_Key, mx.array] = {}
        arrays.update(self._outside.items())
        for number, recorded in enumerate(self._calls[:count]):
            for index in floating_indices(recorded.outputs):
                arrays[_Output(number, index)] = recorded.outputs[index]
        return list(arrays), list(arrays.values())

    def _repeat(self, values: dict[_Key, mx.array], stop: int | None) -> Any:
        """Run the function with `values` for parameters and outputs of blocks."""
        parameters = [(name, values[name]) for name in self._outside]
        self._model.update(tree_unflatten(parameters))
        try:
            return self._play(_Player(self._calls, values, stop))
        finally:
            self._model.update(tree_unflatten(list(self._outside.items())))

    def _add(self, gradients: dict[_Key, mx.array]) -> None:
        """Add gradients to the sums, in the order in which MLX would add them."""
        for key, gradient in gradients.items():
            before = self._sums.get(key)
            self._sums[key] = gradient if before is None else before + gradient
        mx.eval([self._sums[key] for key in gradients])


def _mark(
    keys: Sequence[_Key], values: Sequence[mx.array], touched: list[_Key]
) -> dict[_Key, mx.array]:
    """Return the values by key; the keys of those that gradients reach are added to `touched`."""
    return {key: _marked(key, value, touched) for key, value in zip(keys, values, strict=True)}


def _marked(key: _Key, value: mx.array, touched: list[_Key]) -> mx.array:
    @mx.custom_function
    def identity(array: mx.array) -> mx.array:
        return array

    @identity.vjp
    def backward(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        touched.append(key)
        return cotangent

    return cast(mx.array, identity(value))
