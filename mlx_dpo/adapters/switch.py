"""One set of weights, two policies: the base and what was trained on it, put on in turn.

Nothing is loaded or copied to switch: adapted layers and bare ones share the base's arrays. Only
where weights of the base itself were trained are those held twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.adapters.attach import adapted_layers, detach_adapters
from mlx_dpo.io.arrays import Arrays, named_arrays

AdapterState = Literal["base", "aligned"]


class _SavedState(NamedTuple):
    """What a model has on: the layers with adapters, and the weights below them."""

    adapted: dict[str, nn.Module]
    weights: Arrays


class AdapterSwitch:
    """The sides of `model`; `now` is the one it has on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.now: AdapterState = "base"
        self._kept: dict[AdapterState, _SavedState] = {}

    @property
    def both(self) -> bool:
        """Whether there is something to switch to."""
        return len(self._kept) > 1

    def keep(self, side: AdapterState) -> None:
        """Remember what the model has on now as this side."""
        adapted = adapted_layers(self.model)
        detach_adapters(self.model)
        self._kept[side] = _SavedState(adapted, named_arrays(self.model.parameters()))
        self._attach(adapted)
        self.now = side

    def put(self, side: AdapterState) -> None:
        """Make the model compute as this side, bit for bit; KeyError if it was never kept."""
        kept = self._kept[side]
        if side == self.now:
            return
        detach_adapters(self.model)
        here = named_arrays(self.model.parameters())
        other = [(k, value) for k, value in kept.weights.items() if here[k] is not value]
        self.model.update(tree_unflatten(other))
        self._attach(kept.adapted)
        self.now = side

    def _attach(self, adapted: dict[str, nn.Module]) -> None:
        self.model.update_modules(tree_unflatten(list(adapted.items())))

    @contextmanager
    def on(self, side: AdapterState) -> Iterator[None]:
        """The side inside the block, afterwards the one that was on before."""
        before = self.now
        self.put(side)
        try:
            yield
        finally:
            self.put(before)

    def held_twice(self) -> int:
        """Bytes of the weights that each side has in a version of its own."""
        if not self.both:
            return 0
        one, other = (kept.weights for kept in self._kept.values())
        return sum(value.nbytes for name, value in one.items() if other[name] is not value)


def evaluate_arrays(model: nn.Module) -> None:
    """Compute every array of the model, also those that MLX does not count as parameters.

    Another thread could not: what is not computed yet belongs to the stream that it was made on.
    """
    mx.eval([v for m in model.modules() for v in m.values() if isinstance(v, mx.array)])
