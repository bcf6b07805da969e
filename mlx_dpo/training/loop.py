"""The training loop: yields metrics. Reads no files, writes no files, prints nothing."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_dpo.arrays import scalar
from mlx_dpo.errors import TrainingError
from mlx_dpo.objective.metrics import summarise
from mlx_dpo.policy.scorers import Scorer, plain_scorer
from mlx_dpo.policy.sparing import sparing_memory
from mlx_dpo.preferences.batches import (
    Cost,
    PassLimit,
    micro_batches,
    step_indices,
    steps_per_epoch,
    whole_rows,
)
from mlx_dpo.training.step import MicroBatch, PairLoss, accumulate, clip, make_gradient
from mlx_dpo.types import PairLogps, PairOutcomes, StepMetrics, TokenizedPair


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come; with weights, optimizer and random state, all of its state."""

    step: int = 0  # updates done
    num_tokens: int = 0  # tokens, without padding, seen in them


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which pairs each step sees and how it moves the policy; pure functions of the step."""

    pairs: Sequence[TokenizedPair]
    reference: PairLogps  # (len(pairs),) each
    pair_loss: PairLoss
    beta: float
    learning_rate: Callable[[int], float]  # of the updates done before
    total_steps: int
    batch_size: int
    limit: PassLimit
    max_grad_norm: float
    seed: int
    scorer: Scorer = plain_scorer
    cost: Cost = whole_rows  # of a pass through that scorer
    recompute: bool = False


def train(
    policy: nn.Module, optimizer: optim.Optimizer, plan: Plan, *, start: Progress
) -> Iterator[tuple[Progress, StepMetrics]]:
    """Yield after every update; the caller saves, reports, evaluates and stops.

    Raises:
        TrainingError: a loss or the gradient is not a number. The policy is then as it
            was before the step.
    """
    gradient = make_gradient(policy, plan.pair_loss, beta=plan.beta, scorer=plan.scorer)
    num_tokens = start.num_tokens
    for done in range(start.step, plan.total_steps):
        policy.train()  # the caller may have evaluated since the last step
        indices = step_indices(
            done, count=len(plan.pairs), batch_size=plan.batch_size, seed=plan.seed
        )
        groups = micro_batches(indices, plan.pairs, plan.limit, cost=plan.cost)
        with sparing_memory(policy, recompute=plan.recompute):
            outcome, gradients = accumulate(
                gradient, _micro_batches(plan, groups), pairs=len(indices)
            )
        gradients, norm = clip(gradients, plan.max_grad_norm)
        mx.eval(norm, outcome)
        _refuse_nan(done + 1, outcome, scalar(norm), [plan.pairs[i] for g in groups for i in g])
        rate = plan.learning_rate(done)
        optimizer.learning_rate = rate
        optimizer.update(policy, gradients)
        mx.eval(policy.trainable_parameters(), optimizer.state)
        del gradients  # as large as the adapters, of no use to the next step

        num_tokens += sum(_tokens(plan.pairs[i]) for i in indices)
        yield (
            Progress(step=done + 1, num_tokens=num_tokens),
            StepMetrics(
                step=done + 1,
                epoch=_epoch(plan, done + 1),
                preferences=summarise(outcome),
                grad_norm=scalar(norm),
                learning_rate=rate,
                num_tokens=num_tokens,
                padding_share=_padding_share(plan, groups),
            ),
        )


def _micro_batches(plan: Plan, groups: Sequence[list[int]]) -> Iterator[MicroBatch]:
    for group in groups:
        at = mx.array(group)
        yield MicroBatch(
            [plan.pairs[i] for i in group],
            PairLogps(plan.reference.chosen[at], plan.reference.rejected[at]),
        )


def _padding_share(plan: Plan, groups: Sequence[list[int]]) -> float:
    costs = [plan.cost([plan.pairs[i] for i in group]) for group in groups]
    return sum(cost.padding for cost in costs) / sum(cost.total for cost in costs)


def _tokens(pair: TokenizedPair) -> int:
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def _epoch(plan: Plan, step: int) -> float:
    """Passes over the pairs after `step` updates; the last step of an epoch may be smaller."""
    per_epoch = steps_per_epoch(len(plan.pairs), plan.batch_size)
    whole, rest = divmod(step, per_epoch)
    return whole + rest * plan.batch_size / len(plan.pairs)


def _refuse_nan(
    step: int, outcome: PairOutcomes, norm: float, pairs: Sequence[TokenizedPair]
) -> None:
    finite = np.isfinite(np.array(outcome.losses))
    if finite.all() and math.isfinite(norm):
        return
    what = "the gradient is" if finite.all() else "the loss is"
    culprits = [pair.where for pair, ok in zip(pairs, finite, strict=True) if not ok]
    places = culprits or [pair.where for pair in pairs]
    shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    raise TrainingError(
        f"step {step}: {what} not a number at {shown}; "
        "lower the learning rate, or try --dtype float32"
    )
