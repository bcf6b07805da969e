"""Numerical self-test of training on the device in use.

A tiny random Llama with adapters computes log-probs and gradients, is trained for one step, saved
and loaded. The expected values come from a NumPy model in float64, which shares no code with MLX.
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
from mlx_dpo.adapters.adapter_files import load_adapter, save_adapter
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.collate import collate
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

# Head size 64, for which GPUs have a fused attention kernel.
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
# Kernels process a row in blocks of 32 to 128 positions; this row needs a second block in each.
# Few tokens are scored, so that errors of either sign do not cancel.
LONG_PAIRS = (
    TokenizedPair(
        prompt=tuple(7 * position % 96 for position in range(130)), chosen=(40, 47), rejected=(60,)
    ),
)
RANK, SCALE = 4, 2.0
GROUP_SIZE = 32


def make_policy(
    *, bits: int | None = None, dtype: mx.Dtype = mx.float32, fresh: bool = False
) -> nn.Module:
    """Return the tiny model under test, with random adapters, or with new ones if `fresh`.

    The model is the same at every call. Weights and adapters have values of `dtype`. Quantized
    weights stay packed, also on the CPU.
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
        random = {name: rng.normal(0, 0.1, value.shape) for name, value in weights.items()}
        # Adapters are stored in float32, but the forward pass casts them to `dtype`.
        rounded = [(k, mx.array(v, dtype).astype(mx.float32)) for k, v in random.items()]
        model.load_weights(rounded, strict=False)
    mx.eval(model.parameters())
    return model


BETA = 0.5

# Relative errors: 1e-7 and 1e-6 in float32, 1e-4 and 2e-3 in TF32, which GPUs may use.
LOGPS_LIMITS = {"cpu": 1e-5, "metal": 1e-3, "cuda": 1e-3}
GRADIENT_LIMITS = {"cpu": 1e-4, "metal": 1e-2, "cuda": 1e-2}
# Independent of the device: results of operations are rounded to 8 or 11 bits. The error of ten
# random models was at most 2e-3 and 3e-4; with attention scores off by 30 % it is 2e-2.
SIXTEEN_BIT_LIMITS = {mx.bfloat16: 7e-3, mx.float16: 1e-3}


@dataclass(frozen=True)
class Check:
    """The result of a check: the measured error and the largest error that passes."""

    name: str
    measured: float
    limit: float
    trouble: str = ""  # error message of the device, if nothing could be measured

    @property
    def ok(self) -> bool:
        """Whether an error was measured and is within its limit; NaN is not."""
        return not self.trouble and self.measured <= self.limit


def measure_logps_error(bits: int | None, dtype: mx.Dtype = mx.float32) -> float:
    """Return the largest error of completion log-probs, compared with the float64 model.

    The error is relative for log-probs of magnitude above 1, else absolute.
    """
    policy, errors = make_policy(bits=bits, dtype=dtype), []
    weights = float64.dequantized_weights(policy)
    for pairs in (PAIRS, LONG_PAIRS):
        batch = collate(pairs)
        expected = float64.completion_logps(weights, ARGS, SCALE, batch)
        measured = np.array(completion_logps(policy, batch), np.float64)
        errors.append(np.abs(measured - expected) / np.maximum(1, np.abs(expected)))
    return float(np.max(np.concatenate(errors)))


def measure_gradient_error(bits: int | None) -> float:
    """Return the largest relative error of the loss gradient over the adapter matrices.

    Each gradient is checked as a directional derivative, against central differences in float64.
    """
    policy, batch = make_policy(bits=bits), collate(PAIRS)
    with adapters.disable_adapters(policy):
        reference = pair_logps(policy, batch)
    micro_batch = MicroBatch.of(PAIRS, reference)
    _, gradients = loss_and_gradients(policy, Objective(LossSettings(beta=BETA)), [micro_batch])
    weights = float64.dequantized_weights(policy)

    def loss(perturbed: float64.Weights) -> float:
        logps = float64.completion_logps(perturbed, ARGS, SCALE, batch)
        log_ratios = logps - np.concatenate([np.array(part) for part in reference])
        chosen, rejected = np.split(log_ratios, 2)
        return float(np.mean(np.log1p(np.exp(-BETA * (chosen - rejected)))))

    rng, step, errors = np.random.default_rng(3), 1e-4, []
    for name, value in named_arrays(gradients).items():
        gradient = np.array(value, np.float64)
        norm, noise = np.linalg.norm(gradient), rng.normal(size=gradient.shape)
        if norm == 0:
            return math.inf  # the loss depends on every matrix of this model
        direction = gradient / norm + noise / np.linalg.norm(noise)
        plus = loss(weights | {name: weights[name] + step * direction})
        minus = loss(weights | {name: weights[name] - step * direction})
        expected = (plus - minus) / (2 * step)
        errors.append(abs((gradient * direction).sum() - expected) / norm)
    return float(np.max(errors))


def train_two_steps() -> tuple[float, float]:
    """Train fresh adapters for two optimizer steps on the same pairs; return both losses."""
    policy = make_policy(fresh=True)
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


def measure_first_loss_error() -> float:
    """Return |first loss - log 2|; the loss is log 2 as long as the policy equals the reference."""
    return abs(train_two_steps()[0] - math.log(2))


def measure_loss_change() -> float:
    """Return how one optimizer step changes the training loss; the value should be negative."""
    first, second = train_two_steps()
    return second - first


def measure_reload_error() -> float:
    """Return the largest change of any logit after the adapters are saved and loaded."""
    policy = make_policy()
    tokens = collate(PAIRS).tokens
    mx.random.seed(0)
    loaded = llama.Model(ARGS)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), policy, adapters.make_adapter_config(policy))
        load_adapter(loaded, Path(folder))
    return float(np.max(np.abs(np.array(policy(tokens) - loaded(tokens)))))


def self_test() -> Iterator[Check]:
    """Run the checks one after another and yield the result of each."""
    kind = device_kind()
    logps_limit, gradient_limit = LOGPS_LIMITS[kind], GRADIENT_LIMITS[kind]
    for bits, base in ((None, "float32"), (4, "4-bit"), (8, "8-bit")):
        yield _run_check(
            f"log-probabilities, {base} base", partial(measure_logps_error, bits), logps_limit
        )
        yield _run_check(
            f"adapter gradients, {base} base", partial(measure_gradient_error, bits), gradient_limit
        )
    for dtype, limit in SIXTEEN_BIT_LIMITS.items():
        measure = partial(measure_logps_error, None, dtype)
        yield _run_check(f"log-probabilities, {dtype_name(dtype)} base", measure, limit)
    # Not exact: on a GPU, attention with gradients uses another kernel than without.
    yield _run_check("first loss is log 2", measure_first_loss_error, 1e-4)
    yield _run_check("an update lowers the loss", measure_loss_change, -0.01)
    yield _run_check("saved adapters give the same logits", measure_reload_error, 0.0)


def _run_check(name: str, measure: Callable[[], float], limit: float) -> Check:
    try:
        return Check(name, measure(), limit)
    except (RuntimeError, DPOError) as error:  # MLX reports device faults as RuntimeError
        return Check(name, math.nan, limit, trouble=reason(error))
