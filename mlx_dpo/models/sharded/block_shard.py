"""The weights of a transformer block as one flat array of bytes, of which each rank holds a slice.

This is what PyTorch's FSDP (ZeRO stage 3) does with a `FlatParameter`, for frozen weights only:
`unshard` gathers the whole array before the block runs, `reshard` frees it afterwards. Weights keep
their dtype, so that packed weights are gathered packed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.distributed.ranks import Ranks

ALIGNMENT = 64  # bytes; kernels of matrix products read vectors at aligned addresses


class Slot(NamedTuple):
    """Where an array of a block belongs, in the block and in the flat array."""

    container: Any  # the module, list or dict that holds the array
    key: Any
    shape: tuple[int, ...]
    dtype: mx.Dtype
    start: int  # first byte in the flat array

    @property
    def end(self) -> int:
        """The byte after the last one of the array."""
        return self.start + math.prod(self.shape) * self.dtype.size

    @property
    def array(self) -> mx.array:
        """The array that the block has here now."""
        return cast(mx.array, self.container[self.key])


class BlockShard:
    """This rank's slice of the weights of a block.

    Between passes the block has placeholders with the shapes and dtypes of its weights. They take
    no memory, and floats among them are NaN, so that no result is computed with them unnoticed.

    Attributes:
        name: name of the block, for messages.
        nbytes: size of the block's weights.
        piece: slice of the flat array that this rank holds. (ceil(nbytes / size),) uint8
    """

    def __init__(self, name: str, block: nn.Module, ranks: Ranks) -> None:
        """Take the weights of `block`, which gets placeholders. Lazy arrays are read one by one.

        An array of which this rank holds nothing is not read.
        """
        self.name, self._ranks = name, ranks
        self.slots = list(find_slots(block))
        self.nbytes = self.slots[-1].end if self.slots else 0
        width = -(-self.nbytes // ranks.size)
        # Order of the axes in memory, by index of the slot, if it is not the usual one.
        self.axes: dict[int, tuple[int, ...]] = {}
        self._placeholders = [_placeholder(slot.shape, slot.dtype) for slot in self.slots]
        self.piece = self._take_slice(ranks.rank * width, width)

    def _take_slice(self, start: int, width: int) -> mx.array:
        """Put placeholders in the block; return bytes `start` to `start + width` of its weights."""
        parts: list[mx.array] = []
        position = start
        for index, (slot, placeholder) in enumerate(
            zip(self.slots, self._placeholders, strict=True)
        ):
            array, slot.container[slot.key] = slot.array, placeholder
            low, high = max(start, slot.start), min(start + width, slot.end)
            if low >= high:
                continue
            mx.eval(array)
            if (axes := _memory_order(array)) is not None:
                self.axes[index] = axes
                array = array.transpose(axes)
            own = array.reshape(-1).view(mx.uint8)[low - slot.start : high - slot.start]
            # A sum, as a slice would keep the whole array in memory.
            parts += [mx.zeros(low - position, mx.uint8), mx.add(own, mx.array(0, mx.uint8))]
            position = high
            mx.eval(parts)
            del array, own
        parts.append(mx.zeros(start + width - position, mx.uint8))
        piece = mx.concatenate(parts)
        mx.eval(piece)
        return piece

    def unshard(self) -> None:
        """Gather the weights of the block and put them in their places. All ranks must do so."""
        rows = self._ranks.all_gather_rows(f"weights of {self.name}", self.piece)
        self.put(self._split(rows.reshape(-1)))

    def tile(self) -> None:
        """Put wrong weights in their places, made of this rank's slice, to measure a pass."""
        rows = mx.concatenate([self.piece] * self._ranks.size)
        mx.eval(rows)
        self.put(self._split(rows))

    def _split(self, flat: mx.array) -> list[mx.array]:
        """Return the arrays of the block, which share the memory of the flat array. (bytes,)"""
        arrays = []
        for index, slot in enumerate(self.slots):
            part = flat[slot.start : slot.end].view(slot.dtype)
            axes = self.axes.get(index)
            if axes is None:
                arrays.append(part.reshape(slot.shape))
                continue
            stored = part.reshape([slot.shape[axis] for axis in axes])
            arrays.append(stored.transpose([axes.index(axis) for axis in range(len(axes))]))
        return arrays

    def put(self, arrays: Sequence[mx.array]) -> None:
        """Put arrays in the places of the block's weights."""
        for slot, array in zip(self.slots, arrays, strict=True):
            slot.container[slot.key] = array

    def reshard(self) -> None:
        """Put placeholders in the places of the block's weights."""
        self.put(self._placeholders)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Give the block its weights inside the `with` block. All ranks must do so."""
        self.unshard()
        try:
            yield
        finally:
            self.reshard()


def find_slots(block: nn.Module) -> Iterator[Slot]:
    """Yield the places of the parameters of a block, one after the other in the flat array."""
    start = 0
    for container, key in _array_places(block):
        array = container[key]
        slot = Slot(container, key, tuple(array.shape), array.dtype, start)
        start = -(-slot.end // ALIGNMENT) * ALIGNMENT
        yield slot


def _array_places(container: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container of arrays with each of its keys, as `nn.Module.parameters` does."""
    is_module = isinstance(container, nn.Module)
    items = container.items() if isinstance(container, Mapping) else enumerate(container)
    for key, value in list(items):
        if is_module and key.startswith("_"):
            continue
        if isinstance(value, mx.array):
            yield container, key
        elif isinstance(value, Mapping | list):
            yield from _array_places(value)


def _placeholder(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return an array that takes the memory of one number."""
    if mx.issubdtype(dtype, mx.floating):
        number = mx.array(float("nan"), dtype)
    else:
        number = mx.array(True) if dtype == mx.bool_ else mx.array(mx.iinfo(dtype).max, dtype)
    array = mx.broadcast_to(number, shape)
    mx.eval(array)
    return array


def _memory_order(array: mx.array) -> tuple[int, ...] | None:
    """Return the order of the axes in memory if `array` is a transposed array; otherwise None.

    Products with a matrix and with its transposed copy may round differently.
    """
    strides = memoryview(cast(Any, array)).strides or ()
    axes = tuple(sorted(range(array.ndim), key=lambda axis: (-strides[axis], axis)))
    expected = array.dtype.size
    for axis in reversed(axes):
        if array.shape[axis] != 1 and strides[axis] != expected:
            return None  # not dense: MLX copies it before a product
        expected *= array.shape[axis]
    return None if axes == tuple(range(array.ndim)) else axes
