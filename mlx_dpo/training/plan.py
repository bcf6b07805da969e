"""Data and hyper-parameters of every optimizer step: the plan of a run and its micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import mlx.core as mx
import mlx.nn as nn

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
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.scoring.scorers import Scorer, plain_scorer
from mlx_dpo.training.grad_cache import GradCache, only_kl_completions
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.reference_logps import SyncedReference
from mlx_dpo.types import LossOutputs, PairLogps, PairMetadata, ScoredPairs, TokenizedPair

Pairs = Sequence[TokenizedPair]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Pairs, objective and hyper-parameters of a run; each step is a pure function of its number.

    Attributes:
        reference: Log-probabilities of `pairs` under the reference, (len(pairs),) each.
        learning_rate: Schedule; takes the number of updates done before.
        limit: Largest micro-batch.
        cost: Tokens that a micro-batch costs with `scorer`.
        score: Scorer without gradients, for GradCache and the synced reference.
        on_policy_weights: WPO's weights of pairs, (B,).
        synced_reference: Replaces `reference` after its first synchronization.
    """

    pairs: Pairs
    reference: PairLogps
    objective: Objective
    learning_rate: Callable[[int], float]
    total_steps: int
    batch_size: int
    limit: PassLimit
    max_grad_norm: float
    seed: int
    scorer: Scorer = plain_scorer
    cost: CountTokens = padded_row_tokens
    recompute: bool = False
    score: DatasetScorer | None = None
    on_policy_weights: Callable[[nn.Module, Pairs], mx.array] | None = None
    synced_reference: SyncedReference | None = None

    def indices(self, step: int) -> list[int]:
        """Return the indices of the pairs of a step; steps count from 1."""
        count, seed = len(self.pairs), self.seed
        return step_indices(step - 1, count=count, batch_size=self.batch_size, seed=seed)

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Return `indices` divided into micro-batches."""
        return micro_batches(indices, self.pairs, self.limit, cost=self.cost)

    def epoch(self, step: int) -> float:
        """Return the number of epochs after `step` updates; the last step of one may be smaller."""
        per_epoch = steps_per_epoch(len(self.pairs), self.batch_size)
        whole, rest = divmod(step, per_epoch)
        return whole + rest * self.batch_size / len(self.pairs)

    def padding_share(self, groups: Sequence[list[int]]) -> float:
        """Return the share of padding among the tokens of some micro-batches."""
        costs = [self.cost([self.pairs[i] for i in group]) for group in groups]
        return sum(cost.padding for cost in costs) / sum(cost.total for cost in costs)


class MicroBatch(NamedTuple):
    """Input of one forward and backward pass. Arrays are (B,) unless stated otherwise."""

    pairs: Pairs
    reference: PairLogps
    metadata: PairMetadata
    on_policy_weights: mx.array
    grad_cache: GradCache | None = None  # for losses that couple the pairs of a step

    @classmethod
    def of(cls, pairs: Pairs, reference: PairLogps) -> Self:
        """Return a micro-batch that is all of its step."""
        return cls(pairs, reference, pair_metadata(pairs), mx.ones((len(pairs),)))

    def with_policy_logps(self, logps: PairLogps) -> ScoredPairs:
        """Return the scored pairs on which the loss depends.

        They are the pairs of this micro-batch, or with GradCache all pairs of the step.
        """
        if self.grad_cache is not None:
            return self.grad_cache.with_gradients(logps)
        return ScoredPairs(logps, self.reference, self.metadata, self.on_policy_weights)

    def select_outputs(self, outputs: LossOutputs) -> LossOutputs:
        """Return the loss outputs of the pairs of this micro-batch. (B,) each"""
        return outputs if self.grad_cache is None else self.grad_cache.select(outputs)


def make_micro_batches(
    policy: nn.Module, plan: TrainingPlan, indices: Sequence[int], groups: Sequence[list[int]]
) -> list[MicroBatch]:
    """Return the micro-batches of a step; `groups` are the indices of each.

    Scores the step without gradients if the objective, WPO or a synced reference needs it.
    """
    step = _score_step(policy, plan, indices)
    positions = {index: position for position, index in enumerate(indices)}
    batches = []
    for group in groups:
        at = [positions[index] for index in group]
        batches.append(
            MicroBatch(
                [plan.pairs[i] for i in group],
                step.reference.take(at),
                select_metadata(step.metadata, mx.array(at)),
                step.on_policy_weights[mx.array(at)],
                _grad_cache(plan, step, at),
            )
        )
    return batches


def _grad_cache(plan: TrainingPlan, step: ScoredPairs, at: Sequence[int]) -> GradCache | None:
    if not plan.objective.uses_whole_batch:
        return None
    return GradCache.of(step, at, labelled=plan.objective.labelled)


def _score_step(policy: nn.Module, plan: TrainingPlan, indices: Sequence[int]) -> ScoredPairs:
    """Return all that is known of the pairs of a step without gradients.

    The log-probabilities of the policy are zeros unless the objective couples pairs.
    """
    pairs = [plan.pairs[i] for i in indices]
    zeros = mx.zeros((len(pairs),))
    logps = PairLogps(zeros, zeros)
    if plan.objective.uses_whole_batch:
        assert plan.score is not None
        logps = plan.score(policy, only_kl_completions(pairs) if plan.objective.labelled else pairs)
    weights = mx.ones_like(zeros)
    if plan.on_policy_weights is not None:
        weights = plan.on_policy_weights(policy, pairs)
    synced = plan.synced_reference and plan.synced_reference.logps(policy, pairs)
    reference = synced or plan.reference.take(indices)
    return ScoredPairs(logps, reference, pair_metadata(pairs), weights)
