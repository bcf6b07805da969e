"""One optimizer update from the micro-batches of a step, lazily evaluated."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_dpo.data.batching import pair_metadata
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.losses.metrics import concatenate
from mlx_dpo.scoring.scorers import Scorer, plain_scorer
from mlx_dpo.training.global_batch import Among, single
from mlx_dpo.training.objective import Objective
from mlx_dpo.types import LossOutputs, PairLogps, PairMetadata, ScoredPairs, TokenizedPair

Gradients = dict[str, Any]


class MicroBatch(NamedTuple):
    """What one forward and backward pass sees."""

    pairs: Sequence[TokenizedPair]
    reference: PairLogps  # (B,) each, of `pairs`
    metadata: PairMetadata
    on_policy_weights: mx.array  # (B,)
    among: Among | None = None  # the rest of the step, where the objective couples its pairs

    @classmethod
    def of(cls, pairs: Sequence[TokenizedPair], reference: PairLogps) -> Self:
        """A micro-batch that is all of its step."""
        return cls(pairs, reference, pair_metadata(pairs), mx.ones((len(pairs),)))


def make_gradient(
    policy: nn.Module, objective: Objective, *, scorer: Scorer = plain_scorer
) -> Callable[[MicroBatch, float], tuple[LossOutputs, Gradients]]:
    """Build the function from a micro-batch to its outcomes and its share of the gradient."""

    def weighed(model: nn.Module, micro: MicroBatch, share: float) -> tuple[mx.array, LossOutputs]:
        pairs = single(micro.pairs) if objective.labelled else micro.pairs
        logps = scorer(model, pairs)
        if micro.among is None:
            scored = ScoredPairs(logps, micro.reference, micro.metadata, micro.on_policy_weights)
            outcome = objective.outcomes(scored)
            # A sum over pairs: micro-batches of any size then add up to the mean of the step.
            return outcome.losses.sum() * share, outcome
        outcome = objective.outcomes(micro.among.with_live(logps, labelled=objective.labelled))
        return outcome.losses.sum() * share, micro.among.own(outcome)

    value_and_grad = nn.value_and_grad(policy, weighed)

    def gradient(micro: MicroBatch, share: float) -> tuple[LossOutputs, Gradients]:
        (_, outcome), gradients = value_and_grad(policy, micro, share)
        return outcome, gradients

    return gradient


def accumulate(
    gradient: Callable[[MicroBatch, float], tuple[LossOutputs, Gradients]],
    micro_batches: Iterable[MicroBatch],
    *,
    pairs: int,
) -> tuple[LossOutputs, Gradients]:
    """Gradient of the mean loss over `pairs` pairs that arrive in micro-batches of any size.

    One graph and one evaluation per micro-batch: while the device works on it, the next
    batch is built, and no second one is begun, so memory stays that of one.
    """
    parts: list[LossOutputs] = []
    total: Gradients | None = None
    waiting = iter(micro_batches)
    micro = next(waiting, None)
    while micro is not None:
        outcome, gradients = gradient(micro, 1.0 / pairs)
        total = gradients if total is None else tree_map(mx.add, total, gradients)
        parts.append(outcome)
        mx.async_eval(outcome, total)
        micro = next(waiting, None)
        mx.eval(total)
    if total is None:
        raise ValueError("a step without pairs")
    return concatenate(parts), total


def clip(gradients: Gradients, max_norm: float) -> tuple[Gradients, mx.array]:
    """Gradients of global norm at most `max_norm` (0: as they are), and the norm before. ()

    The norm is taken in float32 whatever their type: squares of float16 overflow, and a sum of
    bfloat16 squares rounds. Each gradient keeps its type. As PyTorch: 1e-6 beside the norm.
    """
    squares = (mx.square(g.astype(mx.float32)).sum() for g in named_arrays(gradients).values())
    norm = mx.sqrt(sum(squares, start=mx.array(0.0)))
    if max_norm <= 0:
        return gradients, norm
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return tree_map(lambda g: (g.astype(mx.float32) * factor).astype(g.dtype), gradients), norm
