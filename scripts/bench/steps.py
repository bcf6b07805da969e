"""Measurement of one pass over a few pairs: seconds, peak memory, tokens through the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.losses.log_ratios import log_ratio_margin
from mlx_dpo.losses.pairwise import sigmoid_loss
from mlx_dpo.profiling.bench.shapes import SEED, Shape
from mlx_dpo.scoring.scorers import Scorer, fast_inference, memory_efficient_training
from mlx_dpo.scoring.select_scorer import select_scorer
from mlx_dpo.types import PairLogps, TokenizedPair

RANK, SCALE, BETA = 8, 2.0, 0.1
PassFunction = Callable[[], Any]  # returns the arrays to evaluate


@dataclass(frozen=True)
class ScorerVariant:
    """A scorer with and without gradients, and the contexts in which both run."""

    name: str
    scorer: Scorer
    forward_only: Scorer
    training_context: Callable[[], AbstractContextManager[None]] = nullcontext
    reference_context: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class PassCost:
    """Time, memory and tokens of one pass."""

    seconds: float
    peak_bytes: int  # beyond the memory held before
    layer_tokens: int
    head_tokens: int


def build(shape: Shape) -> nn.Module:
    """Return a random model of this shape with nonzero adapters on all linear layers."""
    mx.random.seed(SEED)
    model = llama.Model(llama.ModelArgs.from_dict(shape.config()))
    adapters.attach_adapters(model, rank=RANK, scale=SCALE, seed=SEED)
    for module in adapters.adapted_layers(model).values():
        module.lora_b = mx.random.normal(module.lora_b.shape) * 0.01
    mx.eval(model.parameters())
    return model


def scorer_variants(model: nn.Module, vocab_size: int) -> list[ScorerVariant]:
    """Return the plain scorer with mlx-lm's kernels, and the selected one with ours.

    The selected scorer comes with and without recomputation.
    """
    plain, selected = (
        select_scorer(model, vocab_size=vocab_size, requested=setting)
        for setting in ("plain", "auto")
    )
    variants = [ScorerVariant("plain", plain.scorer, plain.forward_only)]
    for name, recompute in ((selected.name, False), (f"{selected.name}, recomputed", True)):
        if selected.name != "plain":
            training = partial(memory_efficient_training, model, recompute=recompute)
            reference = partial(fast_inference, model)
            variants.append(
                ScorerVariant(name, selected.scorer, selected.forward_only, training, reference)
            )
    return variants


def reference_pass(
    model: nn.Module, variant: ScorerVariant, pairs: Sequence[TokenizedPair]
) -> PassFunction:
    """Return a pass without gradients, with adapters disabled."""

    def run() -> PairLogps:
        with adapters.disable_adapters(model), variant.reference_context():
            return variant.forward_only(model, pairs)

    return run


def training_pass(
    model: nn.Module, variant: ScorerVariant, pairs: Sequence[TokenizedPair]
) -> PassFunction:
    """Return a pass that computes the loss and the gradients of the adapters."""
    zero = PairLogps(mx.zeros((len(pairs),)), mx.zeros((len(pairs),)))

    def objective(policy: nn.Module) -> mx.array:
        margins = log_ratio_margin(variant.scorer(policy, pairs), zero)
        return sigmoid_loss(margins, beta=BETA).sum()

    gradient = nn.value_and_grad(model, objective)

    def run() -> Any:
        with variant.training_context():
            return gradient(model)

    return run


def measure(model: nn.Module, run: PassFunction, *, repeats: int) -> PassCost:
    """Return the cost: the fastest of `repeats` runs, after a warm-up run that is counted."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with count_work(model) as work:
        mx.eval(run())
    peak = mx.get_peak_memory() - before
    return PassCost(
        min(_measure_seconds(run) for _ in range(repeats)),
        peak,
        work.layer_tokens,
        work.head_tokens,
    )


def _measure_seconds(run: PassFunction) -> float:
    """Return the seconds of one run."""
    started = perf_counter()
    mx.eval(run())
    return perf_counter() - started


@dataclass
class WorkCounter:
    """Tokens that went through backbone and head of a model."""

    layer_tokens: int = 0
    head_tokens: int = 0


@contextmanager
def count_work(model: llama.Model) -> Iterator[WorkCounter]:
    """Count tokens into the backbone and into the tied head inside the block."""
    work = WorkCounter()
    backbone, embedding = model.model, model.model.embed_tokens
    kinds = type(backbone), type(embedding)

    class CountingBackbone(kinds[0]):
        def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            work.layer_tokens += inputs.size
            return super().__call__(inputs, *args, **kwargs)

    class CountingHead(kinds[1]):
        def as_linear(self, x: mx.array) -> mx.array:
            work.head_tokens += x.size // x.shape[-1]
            return super().as_linear(x)

    backbone.__class__, embedding.__class__ = CountingBackbone, CountingHead
    try:
        yield work
    finally:
        backbone.__class__, embedding.__class__ = kinds
