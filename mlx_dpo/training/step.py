"""One optimizer step of DPO: log-probs, log-ratios, loss, gradients, clipping, update."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_dpo.errors import TrainingError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.losses.log_ratios import log_ratios
from mlx_dpo.losses.metrics import concatenate_outputs
from mlx_dpo.optim.grouped_update import GroupedUpdate
from mlx_dpo.scoring.scorers import Scorer, memory_efficient_training, plain_scorer
from mlx_dpo.training.grad_cache import skip_kl_completions
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch, TrainingPlan
from mlx_dpo.types import LossOutputs

Gradients = dict[str, Any]


def loss_and_gradients(
    policy: nn.Module,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    *,
    scorer: Scorer = plain_scorer,
) -> tuple[LossOutputs, Gradients]:
    """Return the losses and rewards of all pairs of a step, and the gradients of the mean loss."""
    num_pairs = sum(len(batch.pairs) for batch in micro_batches)

    def loss(model: nn.Module, batch: MicroBatch) -> tuple[mx.array, LossOutputs]:
        pairs = skip_kl_completions(batch.pairs) if objective.labelled else batch.pairs
        logps = scorer(model, pairs)  # log pi(y|x) of chosen and rejected, (B,) each
        scored = batch.with_policy_logps(logps)  # together with log pi_ref(y|x)
        ratios = log_ratios(scored.policy, scored.reference)  # log pi(y|x) - log pi_ref(y|x)
        outputs = objective.compute_outputs(scored, ratios)  # DPO: -log sigmoid(beta * margin)
        # Sums, not means: micro-batches of any size add up to the mean loss of the step.
        return outputs.losses.sum() * (1.0 / num_pairs), batch.select_outputs(outputs)

    return _accumulate(policy, nn.value_and_grad(policy, loss), micro_batches)


def optimizer_step(
    policy: nn.Module,
    update: GroupedUpdate,
    plan: TrainingPlan,
    micro_batches: Sequence[MicroBatch],
    *,
    step: int,
) -> tuple[LossOutputs, mx.array]:
    """Update `policy` once; return losses and rewards, and the gradient norm before clipping.

    Raises:
        TrainingError: a loss or the gradient is not a finite number; the policy is then unchanged.
    """
    weights = named_arrays(policy.trainable_parameters())
    with memory_efficient_training(policy, recompute=plan.recompute):
        outputs, gradients = loss_and_gradients(
            policy, plan.objective, micro_batches, scorer=plan.scorer
        )
    clipped, norm = update.clip(gradients, plan.max_grad_norm)
    del gradients
    mx.eval(norm, outputs)
    _check_finite(step, outputs, norm, micro_batches)
    update.optimizer.learning_rate = plan.learning_rate(step - 1)
    update.apply(policy, weights, clipped)
    mx.eval(policy.trainable_parameters(), update.optimizer.state)
    return outputs, norm


def _accumulate(
    policy: nn.Module, value_and_grad: Any, micro_batches: Sequence[MicroBatch]
) -> tuple[LossOutputs, Gradients]:
    """Return losses and rewards of all micro-batches, and the sum of the gradients.

    The graph of a micro-batch is built while the one before it is computed, but its computation
    begins only afterwards, so that only one is in memory at a time.
    """
    parts: list[LossOutputs] = []
    total: Gradients | None = None
    for batch in micro_batches:
        (_, outputs), gradients = value_and_grad(policy, batch)
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


def _check_finite(
    step: int, outputs: LossOutputs, norm: mx.array, micro_batches: Sequence[MicroBatch]
) -> None:
    """Raise `TrainingError` if a loss or the gradient norm is not a finite number.

    The message names the locations of the pairs whose loss is not finite.
    """
    finite = np.isfinite(np.array(outputs.losses))
    if finite.all() and mx.isfinite(norm).item():
        return
    what = "the gradient is" if finite.all() else "the loss is"
    locations = [pair.location for batch in micro_batches for pair in batch.pairs]
    not_finite = [name for name, is_ok in zip(locations, finite, strict=True) if not is_ok]
    places = not_finite or locations
    shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    raise TrainingError(
        f"step {step}: {what} not a finite number at {shown}; lower the learning rate, or try "
        "--dtype float32"
    )
