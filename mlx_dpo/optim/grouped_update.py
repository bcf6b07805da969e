"""Clip and apply the gradients of many small parameters in a few large operations.

Adapters are hundreds of small arrays. MLX's optimizers update one array after another, with some
thirty operations each, and on a GPU every operation is a kernel of its own. Here parameters are
packed into groups, and each group is updated by the optimizer's own formula as if it were a single
parameter. Parameters and optimizer state keep their tree of arrays, which are views of the groups.

The numbers do not change: the formulas act on each number, on each row or on each matrix alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.optim.optimizers import Muon

# A larger parameter keeps a device busy on its own. Packing it would take memory for nothing.
MAX_PACKED_NUMBERS = 2**20
MAX_GROUP_NUMBERS = 2**24
# MLX's CPU backend adds up numbers one after the other: the sum of 2^20 squares is 5e-4 too small,
# that of 2^24 3e-2. Larger parameters are therefore summed row by row.
MAX_SUMMED_NUMBERS = 2**17

# Optimizers whose formula acts on each number alone.
ELEMENTWISE = (optim.SGD, optim.RMSprop, optim.Adam, optim.AdamW, optim.Lion)
# Optimizers whose formula acts on each matrix of a stack alone; True if only inside `mx.vmap`.
STACKABLE: dict[type[optim.Optimizer], bool] = {Muon: False, optim.Adafactor: True}


@dataclass(frozen=True)
class Group:
    """Parameters that are updated together, sorted by their number of elements.

    Attributes:
        names: dotted paths of the parameters.
        shapes: shapes of the parameters.
        owner: optimizer of the parameters.
        stacked: parameters of one shape get a new first axis; otherwise their numbers are
            concatenated. A group of one parameter leaves it as it is.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    owner: optim.Optimizer
    stacked: bool

    def pack(self, arrays: Sequence[mx.array]) -> mx.array:
        """Return one array per parameter as a single array."""
        if len(arrays) == 1:
            return arrays[0]
        if self.stacked:
            return mx.stack(list(arrays))
        return mx.concatenate([array.reshape(-1) for array in arrays])

    def unpack(self, packed: mx.array) -> list[mx.array]:
        """Return the array of each parameter as a view of the packed array."""
        count = len(self.names)
        if count == 1:
            return [packed]
        if self.stacked:
            return [part.squeeze(0) for part in mx.split(packed, count)]
        ends = list(accumulate(_count_numbers(shape) for shape in self.shapes))
        parts = mx.split(packed, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def sum_squares(self, packed: mx.array) -> mx.array:
        """Return the sum of the squares of each parameter, in float32. (number of parameters,)"""
        squares = mx.square(packed.astype(mx.float32)).reshape(-1)
        sizes = [_count_numbers(shape) for shape in self.shapes]
        runs = [(size, len(list(same))) for size, same in groupby(sizes)]
        ends = list(accumulate(size * count for size, count in runs))
        sums = []
        for part, (size, count) in zip(mx.split(squares, ends[:-1]), runs, strict=True):
            if size > MAX_SUMMED_NUMBERS:
                width = self.shapes[sizes.index(size)][-1]
                part = part.reshape(-1, width).sum(axis=1)
            sums.append(part.reshape(count, -1).sum(axis=1))
        return mx.concatenate(sums)


PackedGradients = list[tuple[Group, mx.array]]


class GroupedUpdate:
    """An optimizer whose clipping and update take few operations for many small parameters.

    Attributes:
        optimizer: optimizer, whose state keeps MLX's tree of one dict per parameter.
    """

    def __init__(self, optimizer: optim.Optimizer, policy: nn.Module) -> None:
        """Wrap `optimizer`; it gets state for each trainable parameter that has none yet."""
        optimizer.init(policy.trainable_parameters())
        self.optimizer = optimizer
        self._packed: dict[tuple[str, str], tuple[list[mx.array], mx.array]] = {}

    def clip(self, gradients: Any, max_norm: float) -> tuple[PackedGradients, mx.array]:
        """Pack the gradients, scaled down to a global norm of at most `max_norm`.

        The norm is computed in float32 whatever the dtype of the gradients, because squares of
        float16 overflow and sums of bfloat16 squares lose precision. Each gradient keeps its dtype.
        As in PyTorch, 1e-6 is added to the norm.

        Args:
            gradients: gradients of all trainable parameters.
            max_norm: maximum of the global norm; 0 clips nothing.

        Returns:
            The scaled gradients, and the global norm before scaling as a scalar array.
        """
        arrays = named_arrays(gradients)
        packed = [
            (group, group.pack([arrays[name] for name in group.names]))
            for group in make_groups(self.optimizer, arrays)
        ]
        sums = mx.concatenate([group.sum_squares(gradient) for group, gradient in packed])
        places = {name: i for i, name in enumerate(n for group, _ in packed for n in group.names)}
        # Added one after the other, in the order of the tree: the grouping changes no bit.
        norm = mx.sqrt(mx.cumsum(sums[mx.array([places[name] for name in arrays])])[-1])
        if max_norm <= 0:
            return packed, norm
        factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
        return [(group, _scale(gradient, factor)) for group, gradient in packed], norm

    def apply(self, policy: nn.Module, weights: Arrays, gradients: PackedGradients) -> None:
        """Update the trainable parameters of `policy` and the optimizer's state, unevaluated.

        Args:
            weights: trainable parameters by dotted path, as they were before the gradients.
            gradients: packed gradients of all of them.
        """
        for owner in _owners(self.optimizer):
            owner.apply_gradients({}, {})  # counts the step
        updated: Arrays = {}
        for group, gradient in gradients:
            states = [_entry(group.owner.state, name) for name in group.names]
            state = {
                key: self._pack(group, key, [entry[key] for entry in states]) for key in states[0]
            }
            parameter = self._pack(group, "", [weights[name] for name in group.names])
            new = _update_rule(group)(gradient, parameter, state)
            updated.update(zip(group.names, self._unpack(group, "", new), strict=True))
            for key, value in state.items():
                for entry, part in zip(states, self._unpack(group, key, value), strict=True):
                    entry[key] = part
        policy.update(tree_unflatten(list(updated.items())))

    def _pack(self, group: Group, key: str, arrays: list[mx.array]) -> mx.array:
        """Return the packed arrays; those that the last update unpacked are not copied."""
        views, packed = self._packed.pop((group.names[0], key), ([], None))
        if packed is not None and _same_objects(views, arrays):
            return packed
        return group.pack(arrays)

    def _unpack(self, group: Group, key: str, packed: mx.array) -> list[mx.array]:
        views = group.unpack(packed)
        self._packed[group.names[0], key] = views, packed
        return views


def make_groups(optimizer: optim.Optimizer, gradients: Arrays) -> list[Group]:
    """Divide the parameters into groups that are updated together.

    Args:
        gradients: gradients of all trainable parameters, by dotted path.
    """
    members: dict[Any, list[str]] = {}
    owners = _owners(optimizer)
    counts: dict[Any, int] = {}
    for name, gradient in gradients.items():
        owner = owners[_owner_index(optimizer, name, gradient)]
        stacked = type(owner) not in ELEMENTWISE
        kind: Any = (id(owner), gradient.dtype, gradient.shape if stacked else None)
        can_pack = gradient.size <= MAX_PACKED_NUMBERS
        if not can_pack or (stacked and (type(owner) not in STACKABLE or gradient.ndim < 2)):
            members[name] = [name]
            continue
        counts[kind] = counts.get(kind, 0) + gradient.size
        members.setdefault((kind, counts[kind] // MAX_GROUP_NUMBERS), []).append(name)
    groups = []
    for names in members.values():
        names.sort(key=lambda name: gradients[name].size)
        owner = owners[_owner_index(optimizer, names[0], gradients[names[0]])]
        shapes = tuple(gradients[name].shape for name in names)
        groups.append(Group(tuple(names), shapes, owner, type(owner) not in ELEMENTWISE))
    return groups


def _update_rule(group: Group) -> Callable[[mx.array, mx.array, dict[str, mx.array]], mx.array]:
    """Return the formula of the group's optimizer; it replaces the arrays of the state."""
    owner = group.owner
    if len(group.names) == 1 or not STACKABLE.get(type(owner), False):
        return owner.apply_single

    def each(
        gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        state = dict(state)
        return owner.apply_single(gradient, parameter, state), [state[key] for key in sorted(state)]

    def rule(gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        new, values = mx.vmap(each)(gradient, parameter, state)
        state.update(zip(sorted(state), values, strict=True))
        return new

    return rule


def _scale(gradient: mx.array, factor: mx.array) -> mx.array:
    return (gradient.astype(mx.float32) * factor).astype(gradient.dtype)


def _owners(optimizer: optim.Optimizer) -> list[optim.Optimizer]:
    return optimizer.optimizers if isinstance(optimizer, optim.MultiOptimizer) else [optimizer]


def _owner_index(optimizer: optim.Optimizer, name: str, gradient: mx.array) -> int:
    """Return the index of the optimizer of a parameter, as MLX's MultiOptimizer selects it."""
    if not isinstance(optimizer, optim.MultiOptimizer):
        return 0
    return next(i for i, matches in enumerate(optimizer.filters) if matches(name, gradient))


def _entry(state: Any, name: str) -> dict[str, mx.array]:
    """Return the state of one parameter: a dict of arrays."""
    for part in name.split("."):
        state = state[int(part)] if isinstance(state, list) else state[part]
    return state


def _same_objects(first: Sequence[mx.array], second: Sequence[mx.array]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _count_numbers(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
