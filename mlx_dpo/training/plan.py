"""The pairs, micro-batches and hyper-parameters of every optimizer step of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.metadata import pair_metadata, select_metadata
from mlx_dpo.data.batches.micro_batches import micro_batches
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.data.batches.token_counts import CountTokens, padded_row_tokens
from mlx_dpo.distributed.ranks import SINGLE_PROCESS, Ranks
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.scoring.scorers import Scorer, plain_scorer
from mlx_dpo.training.grad_cache import GradCache, only_kl_completions
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.synced_reference import SyncedReference
from mlx_dpo.types import LossOutputs, PairLogps, PairMetadata, ScoredPairs, TokenizedPair

Pairs = Sequence[TokenizedPair]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Pairs, objective and hyper-parameters of a run, from which each step's input follows.

    Attributes:
        reference: log-probs of `pairs` under the reference, (len(pairs),) each.
        learning_rate: schedule; takes the number of updates done so far.
        scorer: function that computes the log-probs of pairs with gradients.
        limit: maximum number of pairs or tokens in a micro-batch.
        cost: function that counts the tokens of a micro-batch with `scorer`.
        recompute: whether gradient checkpointing is used.
        passes_at_once: 2 if a second process computes every other micro-batch.
        ranks: processes that share the micro-batches of each step.
        score: function that computes log-probs without gradients, for GradCache and the synced
            reference.
        on_policy_weights: function that computes the WPO weights of pairs, (B,).
        synced_reference: replaces `reference` after its first update.
        group_by_prompt: whether the pairs of a prompt follow each other in the order.
        whole_prompts: whether a step has whole prompts, with all their pairs.
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
    passes_at_once: int = 1
    ranks: Ranks = SINGLE_PROCESS
    score: DatasetScorer | None = None
    on_policy_weights: Callable[[nn.Module, Pairs], mx.array] | None = None
    synced_reference: SyncedReference | None = None
    group_by_prompt: bool = False
    whole_prompts: bool = False

    @cached_property
    def order(self) -> PairOrder:
        """The order in which the steps see the pairs."""
        return PairOrder.of(
            self.pairs,
            batch_size=self.batch_size,
            seed=self.seed,
            group_by_prompt=self.group_by_prompt,
            whole_prompts=self.whole_prompts,
        )

    def indices(self, step: int) -> list[int]:
        """Return the indices into `pairs` of one step's pairs; the first step is number 1."""
        return self.order.step(step - 1)

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Divide the `indices` of a step's pairs into one list per micro-batch."""
        return micro_batches(indices, self.pairs, self.limit, cost=self.cost)

    def epoch(self, step: int) -> float:
        """Return the number of epochs after `step` updates, with fractions."""
        return self.order.epochs_after(step)

    def padding_share(self, groups: Sequence[list[int]]) -> float:
        """Return the share of padding among the tokens of the given micro-batches, from 0 to 1."""
        costs = [self.cost([self.pairs[i] for i in group]) for group in groups]
        return sum(cost.padding for cost in costs) / sum(cost.total for cost in costs)


class MicroBatch(NamedTuple):
    """Input of one forward and backward pass. Arrays have the shape (B,)."""

    pairs: Pairs
    reference: PairLogps
    metadata: PairMetadata
    on_policy_weights: mx.array
    grad_cache: GradCache | None = None  # for losses that couple the pairs of a step
    dropout_seed: int | None = None  # None: dropout continues MLX's random state

    @classmethod
    def of(cls, pairs: Pairs, reference: PairLogps) -> Self:
        """Create a micro-batch of all pairs of a step, with weights of 1."""
        return cls(pairs, reference, pair_metadata(pairs), mx.ones((len(pairs),)))

    def with_policy_logps(self, logps: PairLogps) -> ScoredPairs:
        """Return all inputs of the loss, with `logps` as the policy's log-probs of this batch.

        The result covers the pairs of this micro-batch, or with GradCache all pairs of the step.
        """
        if self.grad_cache is not None:
            return self.grad_cache.with_gradients(logps)
        return ScoredPairs(logps, self.reference, self.metadata, self.on_policy_weights)

    def select_outputs(self, outputs: LossOutputs) -> LossOutputs:
        """Return the losses and rewards of this micro-batch's own pairs. (B,) each

        With GradCache, `outputs` belong to all pairs of the step.
        """
        return outputs if self.grad_cache is None else self.grad_cache.select(outputs)


def make_micro_batches(
    policy: nn.Module,
    plan: TrainingPlan,
    indices: Sequence[int],
    groups: Sequence[list[int]],
    *,
    step: int,
) -> list[MicroBatch]:
    """Create the micro-batches of a step.

    If the objective, WPO or a synced reference needs log-probs of all pairs of the step, these are
    computed first, without gradients.

    Args:
        indices: indices of the pairs of the step.
        groups: the same indices, divided into micro-batches.
        step: number of the step, from 1; dropout depends on it.
    """
    positions = {index: position for position, index in enumerate(indices)}
    places = [[positions[index] for index in group] for group in groups]
    metadata = pair_metadata([plan.pairs[i] for i in indices])
    is_coupled = plan.objective.uses_whole_batch and not _has_whole_lists(plan, metadata, places)
    scored = _score_step(policy, plan, indices, metadata, with_policy=is_coupled)
    batches = []
    for number, (group, at) in enumerate(zip(groups, places, strict=True)):
        batches.append(
            MicroBatch(
                [plan.pairs[i] for i in group],
                scored.reference.take(at),
                select_metadata(scored.metadata, mx.array(at)),
                scored.on_policy_weights[mx.array(at)],
                GradCache.of(scored, at, labelled=plan.objective.labelled) if is_coupled else None,
                dropout_seed(plan.seed, step, number),
            )
        )
    return batches


def dropout_seed(seed: int, step: int, number: int) -> int:
    """Return the seed of the dropout of pass `number` of a step, in a run with seed `seed`.

    A pass drops the same values wherever it is computed, and whatever was computed before.
    """
    sequence = np.random.SeedSequence((seed % 2**64, step, number))
    return int(sequence.generate_state(1, np.uint64)[0])


def _has_whole_lists(
    plan: TrainingPlan, metadata: PairMetadata, places: Sequence[list[int]]
) -> bool:
    """Return whether the losses depend on ranked lists, and each micro-batch has whole lists.

    Args:
        metadata: of all pairs of the step.
        places: positions in the step of each micro-batch's pairs.
    """
    if not plan.objective.couples_lists_only:
        return False
    lists = np.array(metadata.lists)
    return sum(len(set(lists[at].tolist())) for at in places) == len(set(lists.tolist()))


def _score_step(
    policy: nn.Module,
    plan: TrainingPlan,
    indices: Sequence[int],
    metadata: PairMetadata,
    *,
    with_policy: bool,
) -> ScoredPairs:
    """Compute the inputs of the loss for all pairs of a step, without gradients. (B,) each

    The log-probs under the policy are zeros unless `with_policy`.
    """
    pairs = [plan.pairs[i] for i in indices]
    zeros = mx.zeros((len(pairs),))
    logps = PairLogps(zeros, zeros)
    if with_policy:
        assert plan.score is not None
        logps = plan.score(policy, only_kl_completions(pairs) if plan.objective.labelled else pairs)
    weights = mx.ones_like(zeros)
    if plan.on_policy_weights is not None:
        weights = plan.on_policy_weights(policy, pairs)
    synced = plan.synced_reference and plan.synced_reference.logps(policy, pairs)
    reference = synced or plan.reference.take(indices)
    return ScoredPairs(logps, reference, metadata, weights)
