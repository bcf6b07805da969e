"""Does this machine train correctly? Known answers, asked of the device in use.

A tiny random Llama with adapters is scored, differentiated, trained for a step, saved and
loaded. What it should say comes from NumPy in float64, which shares no code with MLX.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import llama

from mlx_dpo.arrays import flat
from mlx_dpo.doctor import float64
from mlx_dpo.doctor.tiny import ARGS, LONG, PAIRS, SCALE, tiny_policy
from mlx_dpo.errors import DPOError, reason
from mlx_dpo.objective.mixture import Objective
from mlx_dpo.policy import adapters
from mlx_dpo.policy.adapter_files import load_adapter, save_adapter
from mlx_dpo.policy.device import device_kind, dtype_name
from mlx_dpo.policy.logps import completion_logps, pair_logps
from mlx_dpo.policy.scoring import score_pairs
from mlx_dpo.preferences.batches import PassLimit, collate
from mlx_dpo.training.loop import Plan, Progress, train
from mlx_dpo.training.step import MicroBatch, make_gradient

BETA = 0.5

# Relative. Float32 errs by 1e-7 and 1e-6; with products of 10-bit mantissas (TF32), as GPUs
# may take them, by 1e-4 and 2e-3.
LOGPS_LIMITS = {"cpu": 1e-5, "metal": 1e-3, "cuda": 1e-3}
GRADIENT_LIMITS = {"cpu": 1e-4, "metal": 1e-2, "cuda": 1e-2}
# The same everywhere: what is stored between operations is rounded to 8 or 11 bits. Ten random
# models erred by 2e-3 and 3e-4 at most; attention 30 % off, by 2e-2.
SIXTEEN_BIT_LIMITS = {mx.bfloat16: 7e-3, mx.float16: 1e-3}


@dataclass(frozen=True)
class Check:
    """A quantity that should be at most `limit`."""

    name: str
    measured: float
    limit: float
    trouble: str = ""  # what the device said instead of an answer

    @property
    def ok(self) -> bool:
        """Whether it is; NaN is not."""
        return not self.trouble and self.measured <= self.limit


def logps_error(bits: int | None, dtype: mx.Dtype = mx.float32) -> float:
    """Largest error of a completion's log-probability, relative where that exceeds one nat."""
    policy, errors = tiny_policy(bits=bits, dtype=dtype), []
    weights = float64.weights_of(policy)
    for pairs in (PAIRS, LONG):
        batch = collate(pairs)
        expected = float64.completion_logps(weights, ARGS, SCALE, batch)
        found = np.array(completion_logps(policy, batch), np.float64)
        errors.append(np.abs(found - expected) / np.maximum(1, np.abs(expected)))
    return float(np.max(np.concatenate(errors)))


def gradient_error(bits: int | None) -> float:
    """Largest relative error of the loss gradient over the adapters' matrices.

    Each matrix is moved along its gradient and some random direction; how the loss answers
    is taken from central differences in float64.
    """
    policy, batch = tiny_policy(bits=bits), collate(PAIRS)
    with adapters.adapters_off(policy):
        reference = pair_logps(policy, batch)
    gradient = make_gradient(policy, Objective(beta=BETA))
    _, gradients = gradient(MicroBatch.of(PAIRS, reference), 1 / len(PAIRS))
    weights = float64.weights_of(policy)

    def loss(moved: float64.Weights) -> float:
        logps = float64.completion_logps(moved, ARGS, SCALE, batch)
        log_ratios = logps - np.concatenate([np.array(part) for part in reference])
        chosen, rejected = np.split(log_ratios, 2)
        return float(np.mean(np.log1p(np.exp(-BETA * (chosen - rejected)))))

    rng, step, errors = np.random.default_rng(3), 1e-4, []
    for name, value in flat(gradients).items():
        found = np.array(value, np.float64)
        size, other = np.linalg.norm(found), rng.normal(size=found.shape)
        if size == 0:
            return math.inf  # every matrix of this model has a say in the loss
        along = found / size + other / np.linalg.norm(other)
        ahead = loss(weights | {name: weights[name] + step * along})
        behind = loss(weights | {name: weights[name] - step * along})
        errors.append(abs((found * along).sum() - (ahead - behind) / (2 * step)) / size)
    return float(np.max(errors))


def first_losses() -> tuple[float, float]:
    """Losses of the first two updates on the same pairs, from fresh adapters."""
    policy = tiny_policy(fresh=True)
    with adapters.adapters_off(policy):
        reference = score_pairs(policy, PAIRS, limit=PassLimit(pairs=2))
    plan = Plan(
        pairs=PAIRS,
        reference=reference,
        objective=Objective(beta=BETA),
        learning_rate=lambda step: 1e-2,
        total_steps=2,
        batch_size=len(PAIRS),
        limit=PassLimit(pairs=2),
        max_grad_norm=1.0,
        seed=0,
    )
    optimizer = optim.AdamW(plan.learning_rate(0), weight_decay=0.0)
    first, second = train(policy, optimizer, plan, start=Progress())
    return first[1].preferences.loss, second[1].preferences.loss


def first_loss_error() -> float:
    """Distance of the first loss from log 2: the policy still is its reference."""
    return abs(first_losses()[0] - math.log(2))


def loss_change() -> float:
    """What one update changes of the loss on its own pairs."""
    first, second = first_losses()
    return second - first


def reload_error() -> float:
    """Largest difference of a logit after saving adapters and loading them onto a fresh base."""
    policy = tiny_policy()
    tokens = collate(PAIRS).tokens
    mx.random.seed(0)
    loaded = llama.Model(ARGS)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), policy, adapters.description(policy))
        load_adapter(loaded, Path(folder))
    return float(np.max(np.abs(np.array(policy(tokens) - loaded(tokens)))))


def self_test() -> Iterator[Check]:
    """Every check, as it is done."""
    kind = device_kind()
    logps_limit, gradient_limit = LOGPS_LIMITS[kind], GRADIENT_LIMITS[kind]
    for bits, base in ((None, "float32"), (4, "4-bit"), (8, "8-bit")):
        yield _check(f"log-probabilities, {base} base", partial(logps_error, bits), logps_limit)
        yield _check(
            f"adapter gradients, {base} base", partial(gradient_error, bits), gradient_limit
        )
    for dtype, limit in SIXTEEN_BIT_LIMITS.items():
        measure = partial(logps_error, None, dtype)
        yield _check(f"log-probabilities, {dtype_name(dtype)} base", measure, limit)
    # Not exact: attention with gradients is another kernel on a GPU than without.
    yield _check("first loss is log 2", first_loss_error, 1e-4)
    yield _check("an update lowers the loss", loss_change, -0.01)
    yield _check("saved adapters give the same logits", reload_error, 0.0)


def _check(name: str, measure: Callable[[], float], limit: float) -> Check:
    try:
        return Check(name, measure(), limit)
    except (RuntimeError, DPOError) as error:  # RuntimeError is what MLX makes of device faults
        return Check(name, math.nan, limit, trouble=reason(error))
