"""What a pass is going to cost, measured: the real one, through a few blocks of the model.

A formula for the memory of a backward pass holds for one architecture on one device. Here the
pass itself, with its scorer and all that saves memory in it, runs through two samples of the
blocks, and what MLX counts for them is drawn out to all. Blocks come one after the other and
every one keeps as much as its like, so that the peak is a line in their number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.io.arrays import random_state
from mlx_dpo.profiling.layer_subset import (
    LayerSample,
    LayersNotFoundError,
    all_layers,
    sample_layers,
    with_layers,
)
from mlx_dpo.profiling.memory import trainable_bytes
from mlx_dpo.scoring.scorers import Scorer, memory_efficient_training
from mlx_dpo.scoring.select_scorer import UNSUPPORTED_ERRORS
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch
from mlx_dpo.training.step import loss_and_gradients
from mlx_dpo.types import PairLogps, TokenizedPair

TRIAL_SHARES = (1 / 16, 1 / 4, 1 / 2, 1)  # of each text, tried until it is seen that all of it fits
SAFETY_FACTOR = 2  # such a guess may be wrong by so much
REPEATS = 3  # MLX works ahead, at times one array further than mostly

Pairs = Sequence[TokenizedPair]
PassFunction = Callable[[Pairs], Any]  # a pass over pairs; returns what is to be evaluated


class Usage(NamedTuple):
    """What something costs."""

    bytes: float  # at the peak, beyond what was held before
    seconds: float


@dataclass(frozen=True)
class PassProfile:
    """What a pass through the whole model costs."""

    outside: Usage  # what does not grow with the blocks: the head, and what is in flight
    block: Usage
    blocks: int  # of the whole model
    share: float = 1.0  # of the texts that was run, where the whole ones might not have fitted

    @property
    def bytes(self) -> int:
        """At the peak, beyond weights and optimizer."""
        return int(self.outside.bytes + self.blocks * self.block.bytes)

    @property
    def seconds(self) -> float:
        """Of one pass."""
        return self.outside.seconds + self.blocks * self.block.seconds


@dataclass(frozen=True, kw_only=True)
class TrainingPass:
    """The passes of an optimizer step, as the loop makes them."""

    scorer: Scorer
    objective: Objective
    accumulates: bool  # whether there are several, so that a gradient is held beside the next one
    recompute: bool = False


def profile_training_pass(
    policy: nn.Module, pairs: Pairs, step: TrainingPass, *, memory: int
) -> PassProfile:
    """What a training pass over `pairs` costs; adapters are attached.

    The policy is left as it was, MLX's random state as well; its peak counter starts anew.
    No more than `memory` bytes are used: pairs are shortened if they might need more.
    """

    def run(pairs: Pairs) -> Any:
        zeros = mx.zeros((len(pairs),))
        batch = MicroBatch.of(pairs, PairLogps(zeros, zeros))
        with memory_efficient_training(policy, recompute=step.recompute):
            return loss_and_gradients(policy, step.objective, [batch], scorer=step.scorer)

    with _as_it_was(policy):
        policy.train()
        cost = _profile_pass(policy, pairs, run, memory)
    held = trainable_bytes(policy) if step.accumulates else 0
    return replace(cost, outside=cost.outside._replace(bytes=cost.outside.bytes + held))


def profile_inference_pass(
    policy: nn.Module, pairs: Pairs, score: PassFunction, *, memory: int
) -> PassProfile:
    """What a pass without gradients costs under `score`; else as above."""
    with _as_it_was(policy):
        policy.eval()
        return _profile_pass(policy, pairs, score, memory)


def shorten_pairs(pairs: Pairs, share: float) -> list[TokenizedPair]:
    """Pairs with this share of each text, at least two tokens of it if there are."""

    def part(tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tokens[: max(2, round(share * len(tokens)))]

    return [
        replace(p, prompt=part(p.prompt), chosen=part(p.chosen), rejected=part(p.rejected))
        for p in pairs
    ]


def _profile_pass(policy: nn.Module, pairs: Pairs, run: PassFunction, memory: int) -> PassProfile:
    """The pass through samples of the blocks; through all where the model does not run on some."""
    try:
        return _extrapolate_layers(policy, sample_layers(policy), pairs, run, memory)
    except (LayersNotFoundError, *UNSUPPORTED_ERRORS):
        return _extrapolate_layers(policy, all_layers(policy), pairs, run, memory)


def _extrapolate_layers(
    policy: nn.Module, chosen: LayerSample, pairs: Pairs, run: PassFunction, memory: int
) -> PassProfile:
    """Bytes and seconds of two samples, as a line in the number of blocks."""
    with with_layers(policy, chosen.large):
        mx.eval(policy.parameters())  # of a model that was built without weights, only these
        share = _share_that_fits(pairs, run, memory)
        used = pairs if share == 1 else shorten_pairs(pairs, share)
        costs = _measure_repeatedly(run, used)
    large, more = _minimum(costs), len(chosen.large)
    small, fewer = Usage(0, 0), 0  # if all blocks ran, there is nothing to be concluded
    if not chosen.is_whole:
        with with_layers(policy, chosen.small):
            small, fewer = _minimum(_measure_repeatedly(run, used)), len(chosen.small)
    # Noise must not make the whole cheaper than its part.
    block = Usage(*(max(0.0, (b - a) / (more - fewer)) for a, b in zip(small, large, strict=True)))
    usual = Usage(sorted(cost.bytes for cost in costs)[len(costs) // 2], large.seconds)
    outside = Usage(*(b - more * each for b, each in zip(usual, block, strict=True)))
    return PassProfile(
        outside=Usage(*(value / share for value in outside)),
        block=Usage(*(value / share for value in block)),
        blocks=chosen.count if fewer else more,
        share=share,
    )


def _share_that_fits(pairs: Pairs, run: PassFunction, memory: int) -> float:
    """The share of the texts for which there is room; kernels are compiled on the way."""
    free = memory - mx.get_active_memory()
    for part, following in pairwise(TRIAL_SHARES):
        needed = _measure(run, shorten_pairs(pairs, part)).bytes * SAFETY_FACTOR / part
        if needed <= free:
            return 1.0
        if needed * following > free:
            break
    return part


def _measure_repeatedly(run: PassFunction, pairs: Pairs) -> list[Usage]:
    return [_measure(run, pairs) for _ in range(REPEATS)]


def _minimum(costs: Sequence[Usage]) -> Usage:
    """The least of several runs, in bytes and in seconds."""
    return Usage(min(cost.bytes for cost in costs), min(cost.seconds for cost in costs))


def _measure(run: PassFunction, pairs: Pairs) -> Usage:
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    began = perf_counter()
    mx.eval(run(pairs))
    seconds = perf_counter() - began
    return Usage(mx.get_peak_memory() - before, seconds)


@contextmanager
def _as_it_was(policy: nn.Module) -> Iterator[None]:
    """Modes and random state after the block are those before it."""
    modes = [(module, module.training) for module in policy.modules()]
    drawn = mx.array(random_state())
    try:
        yield
    finally:
        random_state()[:] = drawn
        for module, mode in modes:  # parents come first: each sets all that is below it
            module.train(mode)


QUADRATIC_THRESHOLD = (
    0.15  # of what a block keeps: a smaller part that grows with the square is noise
)


@dataclass(frozen=True)
class ProfilePoint:
    """A measured pass: so many pairs, and the tokens of each."""

    cost: PassProfile
    pairs: int
    tokens: float

    @property
    def kept(self) -> float:
        """What a block keeps of a token."""
        return self.cost.block.bytes / (self.pairs * self.tokens)


@dataclass(frozen=True)
class MemoryCurve:
    """Bytes of a pass over `pairs` pairs of `tokens` tokens each, t = tokens, m = pairs:

    outside + slope m t + blocks m (linear t + square t^2)
    """

    outside: float
    slope: float
    linear: float
    square: float
    blocks: int

    def bytes(self, pairs: int, tokens: float) -> float:
        """At the peak of such a pass, beyond weights and optimizer."""
        kept = self.linear * tokens + self.square * tokens**2
        return self.outside + self.slope * pairs * tokens + self.blocks * pairs * kept


def fit_memory_curve(long: ProfilePoint, short: ProfilePoint) -> MemoryCurve:
    """The curve through both: a line, unless a part that grows with the square is evident."""
    square = 0.0
    if long.tokens > short.tokens:
        square = max(0.0, (long.kept - short.kept) / (long.tokens - short.tokens))
    if square * long.tokens < QUADRATIC_THRESHOLD * long.kept:
        square = 0.0
    more = long.pairs * long.tokens - short.pairs * short.tokens
    gained = long.cost.outside.bytes - short.cost.outside.bytes
    slope = max(0.0, gained / more) if more > 0 else 0.0
    return MemoryCurve(
        outside=long.cost.outside.bytes - slope * long.pairs * long.tokens,
        slope=slope,
        linear=long.kept - square * long.tokens,
        square=square,
        blocks=long.cost.blocks,
    )


def largest_that_fits(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest number up to `most` that fits, 0 if not even 1 does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
