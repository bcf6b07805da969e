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
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import llama

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.files import load_adapter, save_adapter
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batching import collate
from mlx_dpo.doctor import float64
from mlx_dpo.errors import DPOError, reason
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.device import cast_model, device_kind, dtype_name
from mlx_dpo.scoring.logps import completion_logps, pair_logps
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch, TrainingPlan
from mlx_dpo.training.step import loss_and_gradients
from mlx_dpo.types import TokenizedPair

# Heads of 64: the size for which GPUs have a fused attention kernel.
ARGS = llama.ModelArgs(
    model_type="llama",
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=192,
    num_attention_heads=2,
    num_key_value_heads=1,
    rms_norm_eps=1e-5,
    vocab_size=96,
    rope_theta=10_000,
    tie_word_embeddings=False,
)
PAIRS = tuple(
    TokenizedPair(
        prompt=tuple(range(1, 3 + length)),
        chosen=tuple(range(40, 42 + 3 * length)),
        rejected=tuple(range(60, 69 + length)),
    )
    for length in (1, 5)
)
# Kernels go through a row in blocks of 32 to 128 positions: this one needs a second block of
# each. Few tokens are scored, so that errors of either sign do not cancel.
LONG = (
    TokenizedPair(
        prompt=tuple(7 * position % 96 for position in range(130)), chosen=(40, 47), rejected=(60,)
    ),
)
RANK, SCALE = 4, 2.0
GROUP_SIZE = 32


def tiny_policy(
    *, bits: int | None = None, dtype: mx.Dtype = mx.float32, fresh: bool = False
) -> nn.Module:
    """The policy under test, the same at every call; unless `fresh`, its adapters do something.

    Weights and adapters are numbers of type `dtype`; quantised ones stay packed, on the CPU too.
    """
    mx.random.seed(0)
    model = llama.Model(ARGS)
    if bits is not None:
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits)
    cast_model(model, dtype)
    adapters.attach_adapters(model, rank=RANK, scale=SCALE, seed=1)
    if not fresh:
        rng = np.random.default_rng(2)
        weights = adapters.adapter_weights(model)
        drawn = {name: rng.normal(0, 0.1, value.shape) for name, value in weights.items()}
        # Adapters are held in float32, but computed with in `dtype`.
        rounded = [(k, mx.array(v, dtype).astype(mx.float32)) for k, v in drawn.items()]
        model.load_weights(rounded, strict=False)
    mx.eval(model.parameters())
    return model


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
    with adapters.disable_adapters(policy):
        reference = pair_logps(policy, batch)
    micro_batch = MicroBatch.of(PAIRS, reference)
    _, gradients = loss_and_gradients(policy, Objective(LossSettings(beta=BETA)), [micro_batch])
    weights = float64.weights_of(policy)

    def loss(moved: float64.Weights) -> float:
        logps = float64.completion_logps(moved, ARGS, SCALE, batch)
        log_ratios = logps - np.concatenate([np.array(part) for part in reference])
        chosen, rejected = np.split(log_ratios, 2)
        return float(np.mean(np.log1p(np.exp(-BETA * (chosen - rejected)))))

    rng, step, errors = np.random.default_rng(3), 1e-4, []
    for name, value in named_arrays(gradients).items():
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
    with adapters.disable_adapters(policy):
        reference = score_pairs(policy, PAIRS, limit=PassLimit(pairs=2))
    plan = TrainingPlan(
        pairs=PAIRS,
        reference=reference,
        objective=Objective(LossSettings(beta=BETA)),
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
        save_adapter(Path(folder), policy, adapters.make_adapter_config(policy))
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
