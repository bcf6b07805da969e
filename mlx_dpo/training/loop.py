"""The training loop, which yields metrics. It reads and writes no files and prints nothing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dpo.io.arrays import scalar
from mlx_dpo.optim.grouped_update import GroupedUpdate
from mlx_dpo.parallel.second_process import SecondProcess
from mlx_dpo.training.plan import TrainingPlan, make_micro_batches
from mlx_dpo.training.step import make_second_process, optimizer_step
from mlx_dpo.types import StepMetrics, TokenizedPair


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Position of a run: optimizer steps done, and tokens seen in these steps.

    A run can be resumed from this position, the weights, the optimizer state and the random state.
    """

    step: int = 0  # updates done
    num_tokens: int = 0  # tokens seen in these updates, without padding


def train(
    policy: nn.Module, optimizer: optim.Optimizer, plan: TrainingPlan, *, start: Progress
) -> Iterator[tuple[Progress, StepMetrics]]:
    """Take optimizer steps; yield the progress and the metrics after each step.

    Between two steps the caller can save, report and evaluate, or stop the training.

    Args:
        start: position after which training begins.

    Raises:
        TrainingError: a loss or the gradient is not a finite number. The policy then has the
            weights from before the step.
    """
    num_tokens = start.num_tokens
    update = GroupedUpdate(optimizer, policy)
    with _second_process(policy, plan) as second:
        for step in range(start.step + 1, plan.total_steps + 1):
            indices = plan.indices(step)
            groups = plan.groups(indices)
            micro_batches = make_micro_batches(policy, plan, indices, groups, step=step)
            policy.train()  # scoring without gradients and the caller's evaluation leave it
            outputs, norm = optimizer_step(
                policy, update, plan, micro_batches, step=step, second=second
            )
            if plan.synced_reference is not None:
                plan.synced_reference.follow(policy, step)

            num_tokens += sum(_count_tokens(plan.pairs[i]) for i in indices)
            yield (
                Progress(step=step, num_tokens=num_tokens),
                StepMetrics(
                    step=step,
                    epoch=plan.epoch(step),
                    preferences=plan.objective.compute_metrics(outputs),
                    grad_norm=scalar(norm),
                    learning_rate=plan.learning_rate(step - 1),
                    num_tokens=num_tokens,
                    padding_share=plan.padding_share(groups),
                ),
            )


def _second_process(
    policy: nn.Module, plan: TrainingPlan
) -> AbstractContextManager[SecondProcess | None]:
    """Return the process that computes every other micro-batch; None if there is none."""
    if plan.passes_at_once == 1:
        return nullcontext()
    return make_second_process(policy, plan.objective, plan.scorer)


def _count_tokens(pair: TokenizedPair) -> int:
    completions = [ids for ids in (pair.chosen, pair.rejected) if ids]
    return sum(len(pair.prompt) + len(ids) for ids in completions)
