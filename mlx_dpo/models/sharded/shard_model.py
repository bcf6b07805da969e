"""Shard a model: each rank keeps 1/N of the weights of each transformer block.

Embedding, LM head and final norm stay whole on every rank. The weights of a block are gathered when
it runs (`scoring/sharded`).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.sharded.block_shard import BlockShard, find_slots

ATTRIBUTE = "_shard"  # of a block that is sharded
MIN_COMPARED, MAX_COMPARED = 2, 4  # blocks whose weights are kept for the comparison
ADVICE = "it cannot be sharded; use a machine that holds the whole model, or a smaller model"


class ModelShards:
    """This rank's part of the weights of a model's blocks.

    Attributes:
        ranks: the ranks that hold the other parts.
        blocks: the sharded blocks, in the order of the model.
        whole: the whole weights of the first blocks, until these were compared.
        tape: records or repeats calls of blocks, for gradients; see `scoring/sharded`.
        is_measuring: whether blocks run with wrong weights of the right sizes, without a gather.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        """Find the blocks of `model` and check that they can be sharded; `shard` shards them.

        Raises:
            ModelError: blocks have weights in common with each other or with the other modules.
        """
        self.ranks = ranks
        self.blocks = list({id(block): block for block in model.layers}.values())
        self.whole: dict[int, list[mx.array]] = {}  # by number of the block
        self.tape: Any = None
        self.is_measuring = False
        _check_separate(model, self.blocks)

    def shard(self, prepare: Callable[[nn.Module], None] = lambda block: None) -> None:
        """Replace the weights of the blocks by this rank's slices, one block after the other.

        Args:
            prepare: called with each block before it is sharded, for instance to cast its weights.
        """
        compared = range(_count_compared(self.blocks))
        for number, block in enumerate(self.blocks):
            prepare(block)
            if number in compared:
                mx.eval(block.parameters())
                self.whole[number] = [slot.array for slot in find_slots(block)]
            setattr(block, ATTRIBUTE, BlockShard(f"block {number}", block, self.ranks))
            mx.clear_cache()
        self._exchange_layouts()

    def _exchange_layouts(self) -> None:
        """Take over the memory layouts of arrays that only other ranks have read."""
        mine = [{str(i): axes for i, axes in shard.axes.items()} for shard in self.shards]
        for layouts in self.ranks.all_gather_json("layouts of weights", mine):
            for shard, axes in zip(self.shards, layouts, strict=True):
                shard.axes |= {int(index): tuple(order) for index, order in axes.items()}

    @property
    def shards(self) -> list[BlockShard]:
        """The slices, one per block."""
        return [getattr(block, ATTRIBUTE) for block in self.blocks]

    @property
    def held_bytes(self) -> int:
        """Size of the slices that this rank holds."""
        return sum(shard.piece.nbytes for shard in self.shards)

    @property
    def absent_bytes(self) -> int:
        """Size of the blocks' weights that this rank does not hold."""
        return sum(shard.nbytes for shard in self.shards) - self.held_bytes

    @property
    def gathered_bytes(self) -> int:
        """Size of the largest block, which is in memory while it runs."""
        return max((shard.nbytes for shard in self.shards), default=0)


def find_shards(model: nn.Module) -> ModelShards | None:
    """Return the shards of a model's blocks; None if the model is not sharded."""
    return cast("ModelShards | None", vars(model).get(ATTRIBUTE + "s"))


def shard_model(
    model: nn.Module, ranks: Ranks, prepare: Callable[[nn.Module], None] = lambda block: None
) -> ModelShards:
    """Shard the weights of the blocks of `model` over `ranks`. Lazy weights are read one by one.

    The whole model is never in memory. Afterwards `use_gathered_weights` makes it usable.

    Args:
        prepare: called with each block before it is sharded, for instance to cast its weights.

    Raises:
        ModelError: blocks have weights in common with each other or with the other modules.
    """
    shards = ModelShards(model, ranks)
    shards.shard(prepare)
    setattr(model, ATTRIBUTE + "s", shards)
    return shards


def _check_separate(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Check that no weights belong to two blocks, or to a block and the other modules.

    Raises:
        ModelError: there are no blocks, or their weights are also used elsewhere.
    """
    if not blocks:
        raise ModelError(f"the model has no transformer blocks; {ADVICE}")
    owners: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for array in _arrays(block, set()):
            if owners.setdefault(id(array), number) != number:
                raise ModelError(f"blocks of the model have weights in common; {ADVICE}")
    inside = {id(block) for block in blocks}
    if any(id(array) in owners for array in _arrays(model, inside)):
        raise ModelError(f"a block of the model has weights in common with other parts; {ADVICE}")


def _arrays(tree: Any, skipped: set[int]) -> Iterator[mx.array]:
    """Yield the parameters in `tree`, without those of the modules with the ids `skipped`."""
    if id(tree) in skipped:
        return
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if not (isinstance(tree, nn.Module) and key.startswith("_")):
                yield from _arrays(value, skipped)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _arrays(value, skipped)


def _count_compared(blocks: Sequence[nn.Module]) -> int:
    """Return how many blocks, from the first, have all types of blocks, within the bounds."""
    kinds = [_signature(block) for block in blocks]
    fewest = next(n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds))
    return min(len(kinds), max(MIN_COMPARED, min(MAX_COMPARED, fewest)))


def _signature(block: nn.Module) -> Hashable:
    """Return the types and the shapes of the weights of a block."""
    modules = tuple((path, type(part).__name__) for path, part in block.named_modules())
    arrays = named_arrays(block.parameters())
    return modules, tuple((name, value.shape, value.dtype) for name, value in arrays.items())
