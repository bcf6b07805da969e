"""Switch one loaded model between the base model and the aligned model.

Switching neither loads nor copies weights: both states share the arrays of the base model. Only the
weights that full fine-tuning changed are held twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dpo.adapters.attach import adapted_layers, detach_adapters
from mlx_dpo.io.arrays import Arrays, named_arrays

AdapterState = Literal["base", "aligned"]  # without and with what was trained


class _SavedState(NamedTuple):
    """A model's adapted layers by path, and all weights of the model without these adapters."""

    adapted: dict[str, nn.Module]
    weights: Arrays


class AdapterSwitch:
    """A switch between the base state and the aligned state of `model`, one of which is active."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: AdapterState = "base"
        self._states: dict[AdapterState, _SavedState] = {}

    @property
    def can_switch(self) -> bool:
        """Whether the weights of both the base model and the aligned model were saved."""
        return len(self._states) > 1

    def save_state(self, state: AdapterState) -> None:
        """Save the model's current adapters and weights as `state`, and mark `state` as active."""
        adapted = adapted_layers(self.model)
        detach_adapters(self.model)
        self._states[state] = _SavedState(adapted, named_arrays(self.model.parameters()))
        self._attach(adapted)
        self.active = state

    def activate(self, state: AdapterState) -> None:
        """Restore the adapters and weights that were saved as `state`, bit for bit.

        Raises:
            KeyError: nothing was saved as `state`.
        """
        saved = self._states[state]
        if state == self.active:
            return
        detach_adapters(self.model)
        current = named_arrays(self.model.parameters())
        changed = [(k, value) for k, value in saved.weights.items() if current[k] is not value]
        self.model.update(tree_unflatten(changed))
        self._attach(saved.adapted)
        self.active = state

    def _attach(self, adapted: dict[str, nn.Module]) -> None:
        self.model.update_modules(tree_unflatten(list(adapted.items())))

    @contextmanager
    def activated(self, state: AdapterState) -> Iterator[None]:
        """Activate `state` inside the `with` block, and the previously active state afterwards."""
        before = self.active
        self.activate(state)
        try:
            yield
        finally:
            self.activate(before)

    def duplicated_bytes(self) -> int:
        """Return the size in bytes of the base weights that full fine-tuning changed.

        These weights are held twice in memory; base and aligned model share all others.
        """
        if not self.can_switch:
            return 0
        base, aligned = (state.weights for state in self._states.values())
        return sum(value.nbytes for name, value in base.items() if aligned[name] is not value)


def evaluate_arrays(model: nn.Module) -> None:
    """Evaluate all lazy arrays of the model, including those that MLX does not count as parameters.

    Only the thread that created the arrays can evaluate them, because a lazy array belongs to the
    stream on which it was created.
    """
    mx.eval([v for m in model.modules() for v in m.values() if isinstance(v, mx.array)])
