"""Split a model into its backbone (hidden states) and its head (logits).

No head is implemented here: the logits come from the model's own `__call__`, with the backbone
replaced. This keeps everything that a model does after its backbone, such as tied or quantized
heads, scaling and soft caps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn

BACKBONE_NAMES = ("model", "transformer", "backbone")
LANGUAGE_MODEL = "language_model"  # attribute of multimodal models that holds the text model


class UnsupportedModelError(Exception):
    """Error raised if a scorer cannot compute log-probs with a model; the message says why."""


@dataclass(frozen=True)
class ModelParts:
    """A causal language model, the attribute name of its backbone, and its layers.

    Weights are read from the model in each call, so training does not outdate this object.
    """

    model: nn.Module
    backbone_name: str
    layers: tuple[nn.Module, ...]

    def hidden_states(self, tokens: mx.array, caches: Sequence[Any] | None = None) -> mx.array:
        """Run the backbone and return the hidden states that the head receives. (B, T) -> (B, T, D)

        Args:
            caches: mlx-lm's KV caches of the preceding tokens; `tokens` are appended to them.

        Raises:
            UnsupportedModelError: the backbone does not return a single array.
        """
        backbone = getattr(self.model, self.backbone_name)

        def stop_after_backbone(*args: Any, **kwargs: Any) -> NoReturn:
            raise _BackboneOutputError(backbone(*args, **kwargs))

        try:
            self._call_model(stop_after_backbone, tokens, cache=caches)
        except _BackboneOutputError as done:
            return done.hidden_states()
        raise UnsupportedModelError(f"the model does not call its `{self.backbone_name}`")

    def logits(self, hidden: mx.array) -> mx.array:
        """Apply only the head to hidden states and return the logits. (B, T, D) -> (B, T, V)"""
        tokens = mx.zeros(hidden.shape[:2], mx.int32)
        return self._call_model(lambda *args, **kwargs: hidden, tokens)

    def _call_model(self, backbone: Any, tokens: mx.array, **more: Any) -> mx.array:
        """Call the model with the function `backbone` instead of its backbone."""
        original = getattr(self.model, self.backbone_name)
        proxy = _ModuleProxy(
            self.model, **{self.backbone_name: _ModuleProxy(original, _call=backbone)}
        )
        return type(self.model).__call__(proxy, tokens, **more)


def split_backbone(model: nn.Module) -> ModelParts:
    """Return the parts of `model`: its backbone (hidden states) and its head (logits).

    Raises:
        UnsupportedModelError: the model has no backbone under the names that mlx-lm uses.
    """
    layers = tuple(getattr(model, "layers", ()))
    while isinstance(getattr(model, LANGUAGE_MODEL, None), nn.Module):
        model = getattr(model, LANGUAGE_MODEL)
    for name in BACKBONE_NAMES:
        if isinstance(getattr(model, name, None), nn.Module):
            return ModelParts(model, name, layers)
    names = ", ".join(f"`{name}`" for name in BACKBONE_NAMES)
    raise UnsupportedModelError(f"no backbone named {names}")


class _BackboneOutputError(Exception):
    """Exception that carries the backbone's output out of the model before the head runs."""

    def hidden_states(self) -> mx.array:
        """Return the hidden states, after checking the type of the backbone's output. (B, T, D)

        Raises:
            UnsupportedModelError: the output is not a single array of hidden states.
        """
        [output] = self.args
        if not isinstance(output, mx.array) or output.ndim != 3:
            raise UnsupportedModelError(
                "the backbone returns more than a single array of hidden states"
            )
        return output


class _ModuleProxy:
    """Stand-in for a module that replaces some of its attributes without changing the module.

    Calling the proxy calls its attribute `_call`.
    """

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
