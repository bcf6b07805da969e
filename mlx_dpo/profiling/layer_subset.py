"""A model cut to a few of its blocks, so that a pass through it is quick and small.

Blocks of one kind cost the same. A sample of them that holds every kind, and one about twice
as large, say what the blocks of the whole model cost. Knows nothing of pairs or passes.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.layers import ADAPTED
from mlx_dpo.io import flat

FEWEST = 2  # a single block is the first and the last one, which MLX treats better than others

Blocks = tuple[nn.Module, ...]


class NotCutError(Exception):
    """The list of the model's blocks was not found in it."""


@dataclass(frozen=True)
class Sample:
    """Two samples of the blocks in which gradients flow, and how many of these there are."""

    small: Blocks
    large: Blocks  # the same as `small` where that is all there are
    count: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to be concluded."""
        return len(self.large) in (self.count, len(self.small))


def sample(model: nn.Module) -> Sample:
    """The blocks to look at: as the model begins, and only such that gradients reach.

    Below the first that is trained none flows and nothing is kept, so those blocks cost next
    to nothing; they stand in for none of the others.
    """
    blocks = tuple(model.layers)
    adapted = blocks[first_reached(model) :] or blocks
    kinds = [kind(block) for block in blocks]
    present = {kind(block) for block in adapted}
    shortest = next(k for k in range(1, len(blocks) + 1) if present <= set(kinds[:k]))
    small = max(FEWEST, shortest)
    return Sample(
        small=_like(kinds[:small], adapted),
        large=_like(kinds[: 2 * small], adapted),
        count=len(adapted),
    )


def whole(model: nn.Module) -> Sample:
    """All blocks, for a model that does not run on some of them."""
    blocks = tuple(model.layers)
    return Sample(blocks, blocks, len(blocks))


def kind(block: nn.Module) -> Hashable:
    """What a block costs depends on this alone: the types, shapes and switches of its parts.

    Adapters do not count. Whole numbers do not either: many blocks hold their own position.
    """
    parts: list[Hashable] = [type(block).__qualname__]
    adapted = {path for path, part in block.named_modules() if isinstance(part, ADAPTED)}
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
def only(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """The model with these blocks alone inside the block, with all of its own afterwards.

    Raises:
        NotCutError: the list that `model.layers` shows was not found.
    """
    before = list(model.layers)
    if list(map(id, before)) == list(map(id, blocks)):
        yield
        return
    holder, name = _holder(model, before)
    setattr(holder, name, list(blocks))
    try:
        yield
    finally:
        setattr(holder, name, before)


def _holder(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[nn.Module, str]:
    """The module that holds the list of blocks, and its name there."""
    wanted = list(map(id, blocks))
    for module in model.modules():
        for name, value in module.items():
            if isinstance(value, list) and list(map(id, value)) == wanted:
                return module, name
    raise NotCutError("the list of the model's blocks was not found")


def first_reached(model: nn.Module) -> int:
    """The first block that gradients reach; their number if none does.

    What is trained outside of the blocks may lie before them, as embeddings do.
    """
    blocks = list(model.layers)
    counts = [len(flat(block.trainable_parameters())) for block in blocks]
    if len(flat(model.trainable_parameters())) > sum(counts):
        return 0
    return next((i for i, count in enumerate(counts) if count), len(blocks))


def _like(kinds: Sequence[Hashable], blocks: Blocks) -> Blocks:
    """Different `blocks` of these kinds, as many as there are, in the order of the kinds."""
    unused: dict[Hashable, list[nn.Module]] = {}
    for block in blocks:
        unused.setdefault(kind(block), []).append(block)
    return tuple(unused[k].pop(0) for k in kinds if unused.get(k))
