"""One optimizer step of DPO: log-probs, log-ratios, loss, gradients, clipping, update."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_dpo.distributed.ranks import SINGLE_PROCESS, Ranks
from mlx_dpo.errors import TrainingError
from mlx_dpo.io.arrays import Arrays, named_arrays, random_state
from mlx_dpo.losses.log_ratios import log_ratios
from mlx_dpo.models.restore import preserved_random_state
from mlx_dpo.optim.grouped_update import GroupedUpdate
from mlx_dpo.parallel.second_process import SecondProcess
from mlx_dpo.scoring.scorers import Scorer, memory_efficient_training, plain_scorer
from mlx_dpo.scoring.sharded.value_and_grad import value_and_grad
from mlx_dpo.training.accumulate import (
    Gradients,
    PassResult,
    accumulate,
    accumulate_over_ranks,
)
from mlx_dpo.training.grad_cache import skip_kl_completions
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch, TrainingPlan
from mlx_dpo.types import LossOutputs


def loss_and_gradients(
    policy: nn.Module,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    *,
    scorer: Scorer = plain_scorer,
    second: SecondProcess | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[LossOutputs, Gradients]:
    """Return the losses and rewards of all pairs of a step, and the gradients of the mean loss.

    Args:
        micro_batches: all micro-batches of the step; the same on all ranks.
        second: process that computes every other micro-batch: one of `make_second_process`.
        ranks: processes that share the micro-batches.
    """
    num_pairs = sum(len(batch.pairs) for batch in micro_batches)
    value_and_grad = _value_and_grad(policy, objective, scorer, num_pairs)
    if not ranks.is_alone:
        weights = named_arrays(policy.trainable_parameters())
        return accumulate_over_ranks(partial(value_and_grad, policy), micro_batches, weights, ranks)
    if second is None or len(micro_batches) == 1:
        return accumulate(map(partial(value_and_grad, policy), micro_batches))
    with second.sharing_cores():
        return accumulate(_computed_by_two(policy, value_and_grad, second, micro_batches))


def _value_and_grad(
    policy: nn.Module, objective: Objective, scorer: Scorer, num_pairs: int
) -> Callable[[nn.Module, MicroBatch], PassResult]:
    """Return a function that computes a micro-batch's part of the mean loss of `num_pairs` pairs.

    It returns the loss with the losses and rewards of each pair, and the gradients. Dropout draws
    from the seed of the micro-batch, so that the process that computes it makes no difference.
    """

    def loss(model: nn.Module, batch: MicroBatch) -> tuple[mx.array, LossOutputs]:
        pairs = skip_kl_completions(batch.pairs) if objective.labelled else batch.pairs
        logps = scorer(model, pairs)  # log pi(y|x) of chosen and rejected, (B,) each
        scored = batch.with_policy_logps(logps)  # together with log pi_ref(y|x)
        ratios = log_ratios(scored.policy, scored.reference)  # log pi(y|x) - log pi_ref(y|x)
        outputs = objective.compute_outputs(scored, ratios)  # DPO: -log sigmoid(beta * margin)
        # Sums, not means: micro-batches of any size add up to the mean loss of the step.
        return outputs.losses.sum() * (1.0 / num_pairs), batch.select_outputs(outputs)

    differentiated = value_and_grad(policy, loss)

    def compute(model: nn.Module, batch: MicroBatch) -> PassResult:
        if batch.dropout_seed is None:
            return cast("PassResult", differentiated(model, batch))
        with preserved_random_state(mx.random.key(batch.dropout_seed)):
            return cast("PassResult", differentiated(model, batch))

    return compute


def make_second_process(policy: nn.Module, objective: Objective, scorer: Scorer) -> SecondProcess:
    """Return a process that computes every other micro-batch of each step.

    It is forked in the first step, inside `memory_efficient_training`, and keeps its kernels. It
    gets the trainable weights at each step.
    """

    def answer(
        question: tuple[Arrays, int, Sequence[MicroBatch]],
    ) -> Iterator[tuple[LossOutputs, Gradients]]:
        weights, num_pairs, micro_batches = question
        value_and_grad = _value_and_grad(policy, objective, scorer, num_pairs)
        for batch in micro_batches:
            policy.update(tree_unflatten(list(weights.items())))
            (_, outputs), gradients = value_and_grad(policy, batch)
            mx.eval(outputs, gradients)
            yield outputs, gradients

    return SecondProcess(answer)


def _computed_by_two(
    policy: nn.Module,
    value_and_grad: Callable[[nn.Module, MicroBatch], PassResult],
    second: SecondProcess,
    micro_batches: Sequence[MicroBatch],
) -> Iterator[PassResult]:
    """Yield what `value_and_grad` returns for each micro-batch, every other one by `second`."""
    num_pairs = sum(len(batch.pairs) for batch in micro_batches)
    weights = named_arrays(policy.trainable_parameters())
    question = weights, num_pairs, micro_batches[1::2]
    if second.is_running:
        second.ask(question)
    for number, batch in enumerate(micro_batches):
        if number % 2:
            outputs, gradients = second.receive()
            yield (outputs.losses.sum(), outputs), gradients
            continue
        yield value_and_grad(policy, batch)
        if not second.is_running:  # what all passes share was computed just now, before the fork
            policy.update(tree_unflatten(list(weights.items())))
            second.ask(question)


def optimizer_step(
    policy: nn.Module,
    update: GroupedUpdate,
    plan: TrainingPlan,
    micro_batches: Sequence[MicroBatch],
    *,
    step: int,
    second: SecondProcess | None = None,
) -> tuple[LossOutputs, mx.array]:
    """Update `policy` once; return losses and rewards, and the gradient norm before clipping.

    Args:
        second: process that computes every other micro-batch.

    Raises:
        TrainingError: a loss or the gradient is not a finite number; the policy is then unchanged.
    """
    weights = named_arrays(policy.trainable_parameters())
    with memory_efficient_training(policy, recompute=plan.recompute):
        outputs, gradients = loss_and_gradients(
            policy,
            plan.objective,
            micro_batches,
            scorer=plan.scorer,
            second=second,
            ranks=plan.ranks,
        )
    clipped, norm = update.clip(gradients, plan.max_grad_norm)
    del gradients
    mx.eval(norm, outputs)
    _check_finite(step, outputs, norm, micro_batches)
    update.optimizer.learning_rate = plan.learning_rate(step - 1)
    update.apply(policy, weights, clipped)
    # The random state was restored after each pass, by operations that are not evaluated yet.
    mx.eval(policy.trainable_parameters(), update.optimizer.state, random_state())
    return outputs, norm


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
