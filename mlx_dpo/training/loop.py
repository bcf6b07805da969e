"""The training loop: yields metrics. Reads no files, writes no files, prints nothing."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batching import (
    CountTokens,
    micro_batches,
    padded_row_tokens,
    pair_metadata,
    select_metadata,
    step_indices,
    steps_per_epoch,
)
from mlx_dpo.errors import TrainingError
from mlx_dpo.io.arrays import scalar
from mlx_dpo.losses.metrics import summarise
from mlx_dpo.scoring.memory_saving import memory_efficient_training
from mlx_dpo.scoring.scorers import DatasetScorer, Scorer, plain_scorer
from mlx_dpo.training.global_batch import Among, mismatched
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.reference_logps import MovingReference
from mlx_dpo.training.step import MicroBatch, accumulate, clip, make_gradient
from mlx_dpo.types import LossOutputs, PairLogps, ScoredPairs, StepMetrics, TokenizedPair

Pairs = Sequence[TokenizedPair]


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
    objective: Objective
    learning_rate: Callable[[int], float]  # of the updates done before
    total_steps: int
    batch_size: int
    limit: PassLimit
    max_grad_norm: float
    seed: int
    scorer: Scorer = plain_scorer
    cost: CountTokens = padded_row_tokens  # of a pass through that scorer
    recompute: bool = False
    score: DatasetScorer | None = (
        None  # without gradients; what couples pairs, or moves, asks ahead
    )
    on_policy: Callable[[nn.Module, Pairs], mx.array] | None = None  # weights of pairs. (B,)
    moving: MovingReference | None = None  # takes the place of `reference` once it has moved


def train(
    policy: nn.Module, optimizer: optim.Optimizer, plan: Plan, *, start: Progress
) -> Iterator[tuple[Progress, StepMetrics]]:
    """Yield after every update; the caller saves, reports, evaluates and stops.

    Raises:
        TrainingError: a loss or the gradient is not a number. The policy is then as it
            was before the step.
    """
    gradient = make_gradient(policy, plan.objective, scorer=plan.scorer)
    num_tokens = start.num_tokens
    for done in range(start.step, plan.total_steps):
        indices = step_indices(
            done, count=len(plan.pairs), batch_size=plan.batch_size, seed=plan.seed
        )
        groups = micro_batches(indices, plan.pairs, plan.limit, cost=plan.cost)
        known = _known(policy, plan, indices)
        policy.train()  # what was asked ahead, and the caller's evaluation, left it otherwise
        with memory_efficient_training(policy, recompute=plan.recompute):
            outcome, gradients = accumulate(
                gradient, _micro_batches(plan, indices, groups, known), pairs=len(indices)
            )
        gradients, norm = clip(gradients, plan.max_grad_norm)
        mx.eval(norm, outcome)
        _refuse_nan(done + 1, outcome, scalar(norm), [plan.pairs[i] for g in groups for i in g])
        rate = plan.learning_rate(done)
        optimizer.learning_rate = rate
        optimizer.update(policy, gradients)
        mx.eval(policy.trainable_parameters(), optimizer.state)
        if plan.moving is not None:
            plan.moving.follow(policy, done + 1)
        del gradients  # as large as the adapters, of no use to the next step

        num_tokens += sum(_tokens(plan.pairs[i]) for i in indices)
        yield (
            Progress(step=done + 1, num_tokens=num_tokens),
            StepMetrics(
                step=done + 1,
                epoch=_epoch(plan, done + 1),
                preferences=summarise(outcome, labelled=plan.objective.labelled),
                grad_norm=scalar(norm),
                learning_rate=rate,
                num_tokens=num_tokens,
                padding_share=_padding_share(plan, groups),
            ),
        )


def _known(policy: nn.Module, plan: Plan, indices: Sequence[int]) -> ScoredPairs:
    """What is known of a step before its gradients; policy: zeros, unless pairs are coupled."""
    pairs = [plan.pairs[i] for i in indices]
    zeros = mx.zeros((len(pairs),))
    logps = PairLogps(zeros, zeros)
    if plan.objective.couples:
        assert plan.score is not None
        logps = plan.score(policy, mismatched(pairs) if plan.objective.labelled else pairs)
    weights = mx.ones_like(zeros) if plan.on_policy is None else plan.on_policy(policy, pairs)
    moved = None if plan.moving is None else plan.moving.logps(policy, pairs)
    reference = moved or plan.reference.take(indices)
    return ScoredPairs(logps, reference, pair_metadata(pairs), weights)


def _micro_batches(
    plan: Plan, indices: Sequence[int], groups: Sequence[list[int]], known: ScoredPairs
) -> Iterator[MicroBatch]:
    places = {index: place for place, index in enumerate(indices)}
    for group in groups:
        at = [places[index] for index in group]
        yield MicroBatch(
            [plan.pairs[i] for i in group],
            known.reference.take(at),
            select_metadata(known.metadata, mx.array(at)),
            known.on_policy_weights[mx.array(at)],
            Among.of(known, at) if plan.objective.couples else None,
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
    step: int, outcome: LossOutputs, norm: float, pairs: Sequence[TokenizedPair]
) -> None:
    finite = np.isfinite(np.array(outcome.losses))
    if finite.all() and math.isfinite(norm):
        return
    what = "the gradient is" if finite.all() else "the loss is"
    culprits = [pair.location for pair, ok in zip(pairs, finite, strict=True) if not ok]
    places = culprits or [pair.location for pair in pairs]
    shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    raise TrainingError(
        f"step {step}: {what} not a number at {shown}; "
        "lower the learning rate, or try --dtype float32"
    )
