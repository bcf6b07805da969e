"""A model cut to a few of its blocks, so that a pass through it is quick and small.

Blocks of one kind cost the same. A sample of them that holds every kind, and one about twice
as large, say what the blocks of the whole model cost. Knows nothing of pairs or passes.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.layers import ADAPTER_TYPES
from mlx_dpo.io.arrays import named_arrays

MIN_LAYERS = 2  # a single block is the first and the last one, which MLX treats better than others

Layers = tuple[nn.Module, ...]


class LayersNotFoundError(Exception):
    """The list of the model's blocks was not found in it."""


@dataclass(frozen=True)
class LayerSample:
    """Two samples of the blocks in which gradients flow, and how many of these there are."""

    small: Layers
    large: Layers  # the same as `small` where that is all there are
    count: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to be concluded."""
        return len(self.large) in (self.count, len(self.small))


def sample_layers(model: nn.Module) -> LayerSample:
    """The blocks to look at: as the model begins, and only such that gradients reach.

    Below the first that is trained none flows and nothing is kept, so those blocks cost next
    to nothing; they stand in for none of the others.
    """
    blocks = tuple(model.layers)
    adapted = blocks[first_trained_layer(model) :] or blocks
    kinds = [layer_signature(block) for block in blocks]
    present = {layer_signature(block) for block in adapted}
    shortest = next(k for k in range(1, len(blocks) + 1) if present <= set(kinds[:k]))
    small = max(MIN_LAYERS, shortest)
    return LayerSample(
        small=_layers_with_signatures(kinds[:small], adapted),
        large=_layers_with_signatures(kinds[: 2 * small], adapted),
        count=len(adapted),
    )


def all_layers(model: nn.Module) -> LayerSample:
    """All blocks, for a model that does not run on some of them."""
    blocks = tuple(model.layers)
    return LayerSample(blocks, blocks, len(blocks))


def layer_signature(block: nn.Module) -> Hashable:
    """What a block costs depends on this alone: the types, shapes and switches of its parts.

    Adapters do not count. Whole numbers do not either: many blocks hold their own position.
    """
    parts: list[Hashable] = [type(block).__qualname__]
    adapted = {path for path, part in block.named_modules() if isinstance(part, ADAPTER_TYPES)}
    for path, part in sorted(block.named_modules()):
        parent, _, last = path.rpartition(".")
        if path in adapted or (parent in adapted and last != "linear"):
            continue
        shapes = tuple(
            sorted((k, v.shape, str(v.dtype)) for k, v in part.items() if isinstance(v, mx.array))
        )
        switches = tuple(
            sorted(
                (name, str(value))
                for name, value in vars(part).items()
                if isinstance(value, bool | str | None) and not name.startswith(("_", "training"))
            )
        )
        name = parent if parent in adapted else path
        parts.append((name, type(part).__qualname__, shapes, switches))
    return tuple(parts)


@contextmanager
def with_layers(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """The model with these blocks alone inside the block, with all of its own afterwards.

    Raises:
        NotCutError: the list that `model.layers` shows was not found.
    """
    before = list(model.layers)
    if list(map(id, before)) == list(map(id, blocks)):
        yield
        return
    holder, name = _find_layer_list(model, before)
    setattr(holder, name, list(blocks))
    try:
        yield
    finally:
        setattr(holder, name, before)


def _find_layer_list(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[nn.Module, str]:
    """The module that holds the list of blocks, and its name there."""
    wanted = list(map(id, blocks))
    for module in model.modules():
        for name, value in module.items():
            if isinstance(value, list) and list(map(id, value)) == wanted:
                return module, name
    raise LayersNotFoundError("the list of the model's blocks was not found")


def first_trained_layer(model: nn.Module) -> int:
    """The first block that gradients reach; their number if none does.

    What is trained outside of the blocks may lie before them, as embeddings do.
    """
    blocks = list(model.layers)
    counts = [len(named_arrays(block.trainable_parameters())) for block in blocks]
    if len(named_arrays(model.trainable_parameters())) > sum(counts):
        return 0
    return next((i for i, count in enumerate(counts) if count), len(blocks))


def _layers_with_signatures(kinds: Sequence[Hashable], blocks: Layers) -> Layers:
    """Different `blocks` of these kinds, as many as there are, in the order of the kinds."""
    unused: dict[Hashable, list[nn.Module]] = {}
    for block in blocks:
        unused.setdefault(layer_signature(block), []).append(block)
    return tuple(unused[k].pop(0) for k in kinds if unused.get(k))
