"""Reduce a model to a few of its layers, so that profiling a pass is fast and needs little memory.

Layers with the same signature (types, shapes and flags) cost the same memory and time. Two subsets
of the layers are measured, one about twice as large as the other. The difference of the two
measurements gives the cost per layer, from which the cost of the whole model follows.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.layers import ADAPTER_TYPES
from mlx_dpo.io.arrays import named_arrays

MIN_LAYERS = 2  # a single layer is first and last at once, and needs less memory

Layers = tuple[nn.Module, ...]


class LayersNotFoundError(Exception):
    """Error raised if no attribute of the model holds the list of its layers."""


@dataclass(frozen=True)
class LayerSubsets:
    """A small and a large subset of the layers, measured instead of the whole model."""

    small: Layers
    large: Layers  # equal to `small` if there are no more layers
    count: int

    @property
    def is_whole(self) -> bool:
        """Whether it is enough to measure the larger subset of layers, without extrapolation.

        This holds if `large` contains all layers, or as many layers as `small`.
        """
        return len(self.large) in (self.count, len(self.small))


def choose_layer_subsets(model: nn.Module) -> LayerSubsets:
    """Choose a small and a large subset of the layers, measured instead of all layers.

    The subsets have the types of the model's first layers, but contain only layers that gradients
    reach. Layers before the first trained layer save no activations and cost next to nothing, so
    they cannot represent the others.
    """
    layers = tuple(model.layers)
    trained = layers[first_trained_layer(model) :] or layers
    signatures = [layer_signature(layer) for layer in layers]
    required = {layer_signature(layer) for layer in trained}
    shortest = next(k for k in range(1, len(layers) + 1) if required <= set(signatures[:k]))
    small = max(MIN_LAYERS, shortest)
    return LayerSubsets(
        small=_layers_with_signatures(signatures[:small], trained),
        large=_layers_with_signatures(signatures[: 2 * small], trained),
        count=len(trained),
    )


def all_layers(model: nn.Module) -> LayerSubsets:
    """Return subsets that both contain all layers, for models that need all layers to run."""
    layers = tuple(model.layers)
    return LayerSubsets(layers, layers, len(layers))


def layer_signature(layer: nn.Module) -> Hashable:
    """Return the types, shapes and flags of a layer's modules, which determine its cost.

    Adapters are left out. Integer attributes are left out too, because many layers store their own
    index.
    """
    parts: list[Hashable] = [type(layer).__qualname__]
    adapted = {path for path, part in layer.named_modules() if isinstance(part, ADAPTER_TYPES)}
    for path, part in sorted(layer.named_modules()):
        parent, _, last = path.rpartition(".")
        # An adapted layer counts as its base layer, under the name of the adapted layer.
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
    """Reduce the model to the given `layers` inside the block.

    Raises:
        LayersNotFoundError: no attribute of the model holds the list of its layers.
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
    """Return the module that holds the list of layers, and the name of its attribute.

    Raises:
        LayersNotFoundError: no module holds exactly these layers.
    """
    expected = list(map(id, layers))
    for module in model.modules():
        for name, value in module.items():
            if isinstance(value, list) and list(map(id, value)) == expected:
                return module, name
    raise LayersNotFoundError("the list of the model's layers was not found")


def first_trained_layer(model: nn.Module) -> int:
    """Return the index of the first layer that gradients reach.

    The result is the number of layers if gradients reach none. It is 0 if parameters outside the
    layers are trained, because some of these, such as embeddings, come before all layers.
    """
    layers = list(model.layers)
    counts = [len(named_arrays(layer.trainable_parameters())) for layer in layers]
    if len(named_arrays(model.trainable_parameters())) > sum(counts):
        return 0
    return next((i for i, count in enumerate(counts) if count), len(layers))


def _layers_with_signatures(signatures: Sequence[Hashable], layers: Layers) -> Layers:
    """Return a layer with each of the `signatures`, in order; no layer is returned twice.

    A signature is left out if `layers` contains no further layer that has it.
    """
    unused: dict[Hashable, list[nn.Module]] = {}
    for layer in layers:
        unused.setdefault(layer_signature(layer), []).append(layer)
    return tuple(unused[key].pop(0) for key in signatures if unused.get(key))
