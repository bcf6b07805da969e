"""A model in two halves: the trunk gives hidden states, the head turns them into logits.

What a model does after its trunk (tied or quantised heads, scales, soft caps) stays its own
code: the model's `__call__` is run with its trunk replaced, so nothing is written down twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn

BACKBONE_NAMES = ("model", "transformer", "backbone")
LANGUAGE_MODEL = "language_model"  # where models that also see images keep the part that reads


class UnsupportedModelError(Exception):
    """The model has no trunk that can be taken from its head; says why."""


@dataclass(frozen=True)
class ModelParts:
    """A causal language model and the name of its trunk. Weights are read when called."""

    outer: nn.Module
    trunk: str
    blocks: tuple[nn.Module, ...]

    def hidden(self, tokens: mx.array, caches: Sequence[Any] | None = None) -> mx.array:
        """Hidden states as the head wants them. (B, T) -> (B, T, D)

        Caches, as mlx-lm makes them, say what came before and take up `tokens`.

        Raises:
            NotSplitError: the trunk gives something else than one array.
        """
        trunk = getattr(self.outer, self.trunk)

        def leave(*args: Any, **kwargs: Any) -> NoReturn:
            raise _BackboneOutputError(trunk(*args, **kwargs))

        try:
            self._run(leave, tokens, cache=caches)
        except _BackboneOutputError as done:
            return done.hidden()
        raise UnsupportedModelError(f"the model does not call its `{self.trunk}`")

    def logits(self, hidden: mx.array) -> mx.array:
        """The head alone. (B, T, D) -> (B, T, V)"""
        tokens = mx.zeros(hidden.shape[:2], mx.int32)
        return self._run(lambda *args, **kwargs: hidden, tokens)

    def _run(self, trunk: Any, tokens: mx.array, **more: Any) -> mx.array:
        real = getattr(self.outer, self.trunk)
        outer = _ModuleProxy(self.outer, **{self.trunk: _ModuleProxy(real, _call=trunk)})
        return type(self.outer).__call__(outer, tokens, **more)


def split_backbone(model: nn.Module) -> ModelParts:
    """Find the trunk of `model`.

    Raises:
        NotSplitError: there is none under the names that mlx-lm uses.
    """
    blocks = tuple(getattr(model, "layers", ()))
    while isinstance(getattr(model, LANGUAGE_MODEL, None), nn.Module):
        model = getattr(model, LANGUAGE_MODEL)
    for name in BACKBONE_NAMES:
        if isinstance(getattr(model, name, None), nn.Module):
            return ModelParts(model, name, blocks)
    raise UnsupportedModelError(
        f"no trunk named {', '.join(f'`{name}`' for name in BACKBONE_NAMES)}"
    )


class _BackboneOutputError(Exception):
    """Leaves the model's `__call__` with the trunk's output, before the head is run on it."""

    def hidden(self) -> mx.array:
        [output] = self.args
        if not isinstance(output, mx.array) or output.ndim != 3:
            raise UnsupportedModelError("the trunk gives more than one array of hidden states")
        return output


class _ModuleProxy:
    """A module with some attributes replaced, `_call` being what calls it; it stays untouched."""

    _call: Callable[..., Any]

    def __init__(self, module: nn.Module, **replaced: Any) -> None:
        self.__dict__.update(replaced, _module=module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __contains__(self, name: str) -> bool:
        return name in self._module

    def __getitem__(self, name: str) -> Any:
        return self._module[name]
