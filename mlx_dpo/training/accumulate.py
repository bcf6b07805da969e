"""Add up the gradients of the passes of a step, in one process or over several ranks.

Gradients are added one after the other in the order of the passes, however many ranks compute them.
So a run on several ranks has the same bits as a run in one process. A reduction of MLX's backends
would add them in another order for each number of ranks.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast, get_type_hints

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.losses.metrics import concatenate_outputs
from mlx_dpo.training.plan import MicroBatch
from mlx_dpo.types import LossOutputs

Gradients = dict[str, Any]
# Loss, losses and rewards of the pairs, and gradients of a micro-batch; not evaluated.
PassResult = tuple[tuple[mx.array, LossOutputs], Gradients]


def accumulate(passes: Iterable[PassResult]) -> tuple[LossOutputs, Gradients]:
    """Return losses and rewards of all micro-batches, and the sum of the gradients, in their order.

    The graph of a micro-batch is built while the one before it is computed, but its computation
    begins only afterwards, so that only one is in memory at a time.
    """
    parts: list[LossOutputs] = []
    total: Gradients | None = None
    for (_, outputs), gradients in passes:
        if total is not None:
            mx.eval(total)
            gradients = tree_map(mx.add, total, gradients)
        total = gradients
        del gradients  # a second reference would keep the old sum while the next one is computed
        parts.append(outputs)
        mx.async_eval(outputs, total)
    if total is None:
        raise ValueError("a step has no pairs")
    mx.eval(parts, total)
    return concatenate_outputs(parts), total


def accumulate_over_ranks(
    compute: Callable[[MicroBatch], PassResult],
    micro_batches: Sequence[MicroBatch],
    weights: Arrays,
    ranks: Ranks,
) -> tuple[LossOutputs, Gradients]:
    """Return what `accumulate` returns for all micro-batches, of which each rank computes a share.

    Args:
        compute: function that builds the graph of a pass.
        micro_batches: all micro-batches of the step; the same on all ranks.
        weights: trainable weights, which have the names, shapes and dtypes of the gradients.
    """
    layout = _FlatLayout(weights)
    totals: dict[str, mx.array | None] = dict.fromkeys(layout.names)
    own: dict[str, np.ndarray] = {}
    for round_, (number, outputs, flat) in zip(
        ranks.rounds(len(micro_batches)),
        _own_passes(compute, micro_batches, layout, ranks),
        strict=True,
    ):
        order = sorted(
            (rank for rank, of_rank in enumerate(round_) if of_rank is not None),
            key=lambda rank: round_[rank] or 0,
        )
        for dtype, gradients in flat.items():
            name = f"gradients, {dtype}"
            totals[dtype] = ranks.add_in_order(name, totals[dtype], gradients, order)
        if number is not None:
            own |= _named_outputs(number, outputs)
    gathered: dict[str, np.ndarray] = {}
    for of_rank in ranks.all_gather_arrays("losses and rewards", own):
        gathered |= of_rank
    parts = [_outputs_of(gathered, number) for number in range(len(micro_batches))]
    return concatenate_outputs(parts), layout.unflatten(totals)


def _own_passes(
    compute: Callable[[MicroBatch], PassResult],
    micro_batches: Sequence[MicroBatch],
    layout: "_FlatLayout",
    ranks: Ranks,
) -> Iterator[tuple[int | None, LossOutputs | None, dict[str, mx.array]]]:
    """Yield for each round the number of this rank's pass, its outputs and its flat gradients.

    In a round in which this rank has no pass, the number is None and the gradients do not count.
    The next graph is built while one is computed.
    """

    def build(number: int | None) -> tuple[LossOutputs | None, dict[str, mx.array]]:
        if number is None and not ranks.in_lockstep:
            return None, layout.zeros()
        (_, outputs), gradients = compute(micro_batches[-1 if number is None else number])
        return outputs, layout.flatten(gradients)

    waiting: tuple[int | None, LossOutputs | None, dict[str, mx.array]] | None = None
    for round_ in ranks.rounds(len(micro_batches)):
        graph = build(round_[ranks.rank])
        if waiting is not None:
            mx.eval(waiting[1:])
            yield waiting
        mx.async_eval(graph)
        waiting = round_[ranks.rank], *graph
    if waiting is not None:
        mx.eval(waiting[1:])
        yield waiting


class _FlatLayout:
    """The order of gradients in one flat array per dtype, in which ranks exchange them."""

    def __init__(self, weights: Arrays) -> None:
        """Take the names, shapes and dtypes of `weights`, which gradients share."""
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.sizes = {name: weight.size for name, weight in weights.items()}
        self.names: dict[str, list[str]] = {}  # by dtype
        self._dtypes: dict[str, mx.Dtype] = {}
        for name, weight in weights.items():
            self.names.setdefault(str(weight.dtype), []).append(name)
            self._dtypes[str(weight.dtype)] = weight.dtype

    def flatten(self, gradients: Gradients) -> dict[str, mx.array]:
        """Return the gradients as one flat array for each dtype. (n,)"""
        arrays = named_arrays(gradients)
        return {
            dtype: mx.concatenate([arrays[name].reshape(-1) for name in names])
            for dtype, names in self.names.items()
        }

    def zeros(self) -> dict[str, mx.array]:
        """Return flat arrays of zeros. (n,)"""
        return {
            dtype: mx.zeros((sum(self.sizes[name] for name in names),), self._dtypes[dtype])
            for dtype, names in self.names.items()
        }

    def unflatten(self, flat: Mapping[str, mx.array | None]) -> Gradients:
        """Return the gradients as a tree, from one flat array for each dtype."""
        arrays: Arrays = {}
        for dtype, names in self.names.items():
            ends = np.cumsum([self.sizes[name] for name in names])[:-1].tolist()
            parts = mx.split(cast("mx.array", flat[dtype]), ends)
            for name, part in zip(names, parts, strict=True):
                arrays[name] = part.reshape(self.shapes[name])
        # In the order of the weights: the norm is summed in the order of the tree.
        return cast("Gradients", tree_unflatten([(name, arrays[name]) for name in self.shapes]))


def _named_outputs(number: int, outputs: LossOutputs | None) -> dict[str, np.ndarray]:
    """Return the arrays of a pass's outputs by pass number and position."""
    leaves = [] if outputs is None else tree_flatten(outputs)
    return {f"{number}/{at}": np.array(leaf) for at, (_, leaf) in enumerate(leaves)}


def _outputs_of(gathered: Mapping[str, np.ndarray], number: int) -> LossOutputs:
    """Return the outputs of pass `number` from the arrays that the ranks have sent."""
    positions = itertools.count()

    def build(kind: Any) -> Any:
        if not hasattr(kind, "_fields"):
            return mx.array(gathered[f"{number}/{next(positions)}"])
        hints = get_type_hints(kind)
        return kind(*(build(hints[name]) for name in kind._fields))

    return cast("LossOutputs", build(LossOutputs))
