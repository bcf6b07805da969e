"""Run the blocks of a sharded model: gather the weights, compute the outputs, free the weights.

Each block is evaluated before the next one begins, so that no collective operation is part of a
graph: a GPU never waits for the network, and all ranks gather in the order of the program.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.models.sharded.block_shard import BlockShard
from mlx_dpo.models.sharded.shard_model import ATTRIBUTE, ModelShards, find_shards
from mlx_dpo.scoring.kernels.gradient_checkpointing import LayerCall, LayerResult


class Tape(Protocol):
    """What records or repeats calls of blocks, for gradients."""

    def call(self, layer_call: LayerCall) -> Any:
        """Return the output of a call of a block."""


def use_gathered_weights(model: nn.Module) -> None:
    """Make each block of a sharded model gather its weights when it is called."""
    if (shards := find_shards(model)) is not None:
        for block in shards.blocks:
            block.__class__ = _gathering_class(type(block), shards)


def is_sharded(model: nn.Module) -> bool:
    """Return whether blocks of the model gather their weights when they are called."""
    return any(map(gathers_weights, getattr(model, "layers", ())))


def gathers_weights(block: nn.Module) -> bool:
    """Return whether a block gathers its weights when it is called."""
    return hasattr(type(block), "_gathers_weights")


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run blocks of a sharded model without the other ranks inside the `with` block.

    Memory is that of a real pass. The weights are wrong, so that the results are to be ignored.
    """
    if (shards := find_shards(model)) is None:
        yield
        return
    shards.is_measuring = True
    try:
        yield
    finally:
        shards.is_measuring = False


@contextmanager
def whole_blocks(shards: ModelShards) -> Iterator[list[nn.Module]]:
    """Give the blocks whose whole weights were kept these weights inside the `with` block.

    Yields:
        These blocks, which then are ordinary layers.
    """
    blocks = [shards.blocks[number] for number in shards.whole]
    classes = [type(block) for block in blocks]
    for block, arrays in zip(blocks, shards.whole.values(), strict=True):
        block.__class__ = type(block).__bases__[0]
        _shard(block).put(arrays)
    try:
        yield blocks
    finally:
        for block, gathering in zip(blocks, classes, strict=True):
            block.__class__ = gathering
            _shard(block).reshard()


def _gathering_class(block_class: type, shards: ModelShards) -> type:
    """Return a subclass of `block_class` whose `__call__` gathers the weights of the block."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        layer_call = LayerCall(self, block_class.__call__, args, kwargs)
        if shards.tape is not None:
            return shards.tape.call(layer_call)
        result = run_gathered(layer_call, shards)
        outputs = _without_gradient(layer_call.inputs, result.flattened.arrays)
        return layer_call.finish(result, outputs)

    members = {
        "__call__": __call__,
        "__module__": block_class.__module__,
        "_gathers_weights": True,
    }
    return type(block_class.__name__, (block_class,), members)


def run_gathered(layer_call: LayerCall, shards: ModelShards) -> LayerResult:
    """Return the result of a call of a block, with all arrays evaluated."""
    inputs = fresh(layer_call.inputs)
    mx.eval(inputs)
    with unsharded(layer_call.layer, shards):
        result = layer_call.run(inputs)
        mx.eval(result.flattened.arrays)
    return result


def fresh(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return other Python objects with the same values: a layer may write to its inputs."""
    return [mx.array(array) for array in arrays]


@contextmanager
def unsharded(block: nn.Module, shards: ModelShards) -> Iterator[None]:
    """Give a block its weights inside the `with` block, or wrong ones to measure a pass."""
    shard = _shard(block)
    if shards.is_measuring:
        shard.tile()
    else:
        shard.unshard()
    try:
        yield
    finally:
        shard.reshard()


def _shard(block: nn.Module) -> BlockShard:
    shard: BlockShard = getattr(block, ATTRIBUTE)
    return shard


def _without_gradient(inputs: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
    """Return `outputs`; a gradient of them raises an error.

    Computed arrays are constants for MLX, so that their gradients would be zero.
    """

    @mx.custom_function
    def forward(*arrays: mx.array) -> list[mx.array]:
        return outputs

    @forward.vjp
    def backward(*arrays: Any) -> NoReturn:
        raise RuntimeError("gradients of a sharded model need `sharded.value_and_grad`")

    return list(cast(Any, forward(*inputs)))
