"""A model reduced to a few of its layers, so that profiling a pass is fast and needs little memory.

Layers of one signature cost the same. Two samples, one of which is about twice as large, tell
the cost per layer, and from it that of the whole model.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.layers import ADAPTER_TYPES
from mlx_dpo.io.arrays import named_arrays

MIN_LAYERS = 2  # a single layer is first and last at once, for which MLX needs less memory

Layers = tuple[nn.Module, ...]


class LayersNotFoundError(Exception):
    """The list that holds the model's layers was not found."""


@dataclass(frozen=True)
class LayerSample:
    """Two samples of the layers that gradients reach, and the number of such layers."""

    small: Layers
    large: Layers  # equal to `small` if there are no more
    count: int

    @property
    def is_whole(self) -> bool:
        """Whether all layers are sampled, so that there is nothing to extrapolate."""
        return len(self.large) in (self.count, len(self.small))


def sample_layers(model: nn.Module) -> LayerSample:
    """Return samples that begin like the model and contain only layers that gradients reach.

    Layers below the first trained one save no activations and cost next to nothing: they cannot
    represent the others.
    """
    layers = tuple(model.layers)
    trained = layers[first_trained_layer(model) :] or layers
    signatures = [layer_signature(layer) for layer in layers]
    required = {layer_signature(layer) for layer in trained}
    shortest = next(k for k in range(1, len(layers) + 1) if required <= set(signatures[:k]))
    small = max(MIN_LAYERS, shortest)
    return LayerSample(
        small=_layers_with_signatures(signatures[:small], trained),
        large=_layers_with_signatures(signatures[: 2 * small], trained),
        count=len(trained),
    )


def all_layers(model: nn.Module) -> LayerSample:
    """Return all layers, for a model that does not run on some of them."""
    layers = tuple(model.layers)
    return LayerSample(layers, layers, len(layers))


def layer_signature(layer: nn.Module) -> Hashable:
    """Return what determines the cost of a layer: types, shapes and flags of its modules.

    Adapters do not count. Integer attributes do not either: many layers hold their own index.
    """
    parts: list[Hashable] = [type(layer).__qualname__]
    adapted = {path for path, part in layer.named_modules() if isinstance(part, ADAPTER_TYPES)}
    for path, part in sorted(layer.named_modules()):
        parent, _, last = path.rpartition(".")
        # Of an adapted layer only the base layer counts, under the name of the adapted one.
        if path in adapted or (parent in adapted and last != "linear"):
            continue
        shapes = tuple(
            sorted((k, v.shape, str(v.dtype)) for k, v in part.items() if isinstance(v, mx.array))
        )
        flags = tuple(
            sorted(
                (name, str(value))
                for name, value in vars(part).items()
                if isinstance(value, bool | str | None) and not name.startswith(("_", "training"))
            )
        )
        name = parent if parent in adapted else path
        parts.append((name, type(part).__qualname__, shapes, flags))
    return tuple(parts)


@contextmanager
def with_layers(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Reduce the model to these layers inside the block.

    Raises:
        LayersNotFoundError: the list behind `model.layers` was not found.
    """
    before = list(model.layers)
    if list(map(id, before)) == list(map(id, layers)):
        yield
        return
    holder, name = _find_layer_list(model, before)
    setattr(holder, name, list(layers))
    try:
        yield
    finally:
        setattr(holder, name, before)


def _find_layer_list(model: nn.Module, layers: Sequence[nn.Module]) -> tuple[nn.Module, str]:
    """Return the module that holds the list of layers, and its attribute name."""
    expected = list(map(id, layers))
    for module in model.modules():
        for name, value in module.items():
            if isinstance(value, list) and list(map(id, value)) == expected:
                return module, name
    raise LayersNotFoundError("the list of the model's layers was not found")


def first_trained_layer(model: nn.Module) -> int:
    """Return the index of the first layer that gradients reach; the number of layers if none.

    Trained parameters outside the layers may come before them, as embeddings do: then it is 0.
    """
    layers = list(model.layers)
    counts = [len(named_arrays(layer.trainable_parameters())) for layer in layers]
    if len(named_arrays(model.trainable_parameters())) > sum(counts):
        return 0
    return next((i for i, count in enumerate(counts) if count), len(layers))


def _layers_with_signatures(signatures: Sequence[Hashable], layers: Layers) -> Layers:
    """Return distinct `layers` with these signatures in order, as far as there are any."""
    unused: dict[Hashable, list[nn.Module]] = {}
    for layer in layers:
        unused.setdefault(layer_signature(layer), []).append(layer)
    return tuple(unused[key].pop(0) for key in signatures if unused.get(key))
