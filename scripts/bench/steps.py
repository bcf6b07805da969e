"""One pass over a few pairs under one scorer: seconds, peak memory, and work counted."""

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
from mlx_dpo.scoring import select_scorer as probe
from mlx_dpo.scoring.scorers import Scorer, fast_inference, memory_efficient_training
from mlx_dpo.types import PairLogps, TokenizedPair
from scripts.bench.shapes import SEED, Shape

RANK, SCALE, BETA = 8, 2.0, 0.1
Pass = Callable[[], Any]  # what has to be evaluated


@dataclass(frozen=True)
class Point:
    """Lengths in tokens, and how many such pairs go through together."""

    prompt: int
    chosen: int
    rejected: int
    pairs: int

    @classmethod
    def parse(cls, text: str) -> "Point":
        """`PROMPT:CHOSEN:REJECTED:PAIRS`; ValueError for anything else."""
        point = cls(*(int(part) for part in text.split(":")))
        if min(point.prompt, point.chosen, point.rejected, point.pairs) < 1:
            raise ValueError("every number has to be at least 1")
        return point

    def draw(self, vocab_size: int) -> list[TokenizedPair]:
        """Random pairs of these lengths."""
        mx.random.seed(SEED)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(mx.random.randint(0, vocab_size, (count,)).tolist())

        return [
            TokenizedPair(tokens(self.prompt), tokens(self.chosen), tokens(self.rejected))
            for _ in range(self.pairs)
        ]


@dataclass(frozen=True)
class Way:
    """A scorer, what it scores with where no gradient is wanted, and what surrounds both."""

    name: str
    scorer: Scorer
    forward_only: Scorer
    around_training: Callable[[], AbstractContextManager[None]] = nullcontext
    around_reference: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Cost:
    """What one pass cost."""

    seconds: float
    peak_bytes: int  # beyond what was held before
    trunk_tokens: int
    head_rows: int


def build(shape: Shape) -> nn.Module:
    """A random model of this shape with adapters on all linear layers, none of them zero."""
    mx.random.seed(SEED)
    model = llama.Model(llama.ModelArgs.from_dict(shape.config()))
    adapters.attach_adapters(model, rank=RANK, scale=SCALE, seed=SEED)
    for module in adapters.adapted_layers(model).values():
        module.lora_b = mx.random.normal(module.lora_b.shape) * 0.01
    mx.eval(model.parameters())
    return model


def ways(model: nn.Module, vocab_size: int) -> list[Way]:
    """The plain scorer as mlx-lm runs it, and the engine where the probe lets the model have it."""
    plain, engine = (
        probe.select_scorer(model, vocab_size=vocab_size, requested=wanted)
        for wanted in ("plain", "auto")
    )
    found = [Way("plain", plain.scorer, plain.forward_only)]
    for name, recompute in ((engine.name, False), (f"{engine.name}, recomputed", True)):
        if engine.name != "plain":
            training = partial(memory_efficient_training, model, recompute=recompute)
            reference = partial(fast_inference, model)
            found.append(Way(name, engine.scorer, engine.forward_only, training, reference))
    return found


def reference_pass(model: nn.Module, way: Way, pairs: Sequence[TokenizedPair]) -> Pass:
    """Scores alone, adapters off."""

    def run() -> PairLogps:
        with adapters.disable_adapters(model), way.around_reference():
            return way.forward_only(model, pairs)

    return run


def training_pass(model: nn.Module, way: Way, pairs: Sequence[TokenizedPair]) -> Pass:
    """Loss and the gradients of the adapters."""
    zero = PairLogps(mx.zeros((len(pairs),)), mx.zeros((len(pairs),)))

    def objective(policy: nn.Module) -> mx.array:
        margins = log_ratio_margin(way.scorer(policy, pairs), zero)
        return sigmoid_loss(margins, beta=BETA).sum()

    gradient = nn.value_and_grad(model, objective)

    def run() -> Any:
        with way.around_training():
            return gradient(model)

    return run


def measure(model: nn.Module, run: Pass, *, repeats: int) -> Cost:
    """The fastest of `repeats` runs after one that warms up and is watched."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with counted(model) as work:
        mx.eval(run())
    peak = mx.get_peak_memory() - before
    return Cost(min(_timed(run) for _ in range(repeats)), peak, work.trunk_tokens, work.head_rows)


def _timed(run: Pass) -> float:
    began = perf_counter()
    mx.eval(run())
    return perf_counter() - began


@dataclass
class Work:
    """What went through the two halves of a model."""

    trunk_tokens: int = 0
    head_rows: int = 0


@contextmanager
def counted(model: llama.Model) -> Iterator[Work]:
    """Count tokens into the trunk and rows into the tied head, inside the block."""
    work = Work()
    trunk, embedding = model.model, model.model.embed_tokens
    kinds = type(trunk), type(embedding)

    class CountingTrunk(kinds[0]):
        def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            work.trunk_tokens += inputs.size
            return super().__call__(inputs, *args, **kwargs)

    class CountingHead(kinds[1]):
        def as_linear(self, x: mx.array) -> mx.array:
            work.head_rows += x.size // x.shape[-1]
            return super().as_linear(x)

    trunk.__class__, embedding.__class__ = CountingTrunk, CountingHead
    try:
        yield work
    finally:
        trunk.__class__, embedding.__class__ = kinds
