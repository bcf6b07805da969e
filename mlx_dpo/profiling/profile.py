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

from mlx_dpo.io import random_state
from mlx_dpo.profiling.layer_subset import NotCutError, Sample, only, sample, whole
from mlx_dpo.profiling.memory import trainable_bytes
from mlx_dpo.scoring.memory_saving import sparing_memory
from mlx_dpo.scoring.scorers import Scorer
from mlx_dpo.scoring.select_scorer import UNSUITED
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.step import MicroBatch, accumulate, make_gradient
from mlx_dpo.types import PairLogps, TokenizedPair

PARTS = (1 / 16, 1 / 4, 1 / 2, 1)  # of each text, tried until it is seen that all of it fits
MARGIN = 2  # such a guess may be wrong by so much
REPEATS = 3  # MLX works ahead, at times one array further than mostly

Pairs = Sequence[TokenizedPair]
Run = Callable[[Pairs], Any]  # a pass over pairs; returns what is to be evaluated


class Cost(NamedTuple):
    """What something costs."""

    bytes: float  # at the peak, beyond what was held before
    seconds: float


@dataclass(frozen=True)
class PassCost:
    """What a pass through the whole model costs."""

    outside: Cost  # what does not grow with the blocks: the head, and what is in flight
    block: Cost
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
class Step:
    """The passes of an optimizer step, as the loop makes them."""

    scorer: Scorer
    objective: Objective
    accumulates: bool  # whether there are several, so that a gradient is held beside the next one
    recompute: bool = False


def rehearse_step(policy: nn.Module, pairs: Pairs, step: Step, *, memory: int) -> PassCost:
    """What a training pass over `pairs` costs; adapters are attached.

    The policy is left as it was, MLX's random state as well; its peak counter starts anew.
    No more than `memory` bytes are used: pairs are shortened if they might need more.
    """
    gradient = make_gradient(policy, step.objective, scorer=step.scorer)

    def run(pairs: Pairs) -> Any:
        zeros = mx.zeros((len(pairs),))
        micro = MicroBatch.of(pairs, PairLogps(zeros, zeros))
        with sparing_memory(policy, recompute=step.recompute):
            return accumulate(gradient, [micro], pairs=len(pairs))

    with _as_it_was(policy):
        policy.train()
        cost = _rehearsed(policy, pairs, run, memory)
    held = trainable_bytes(policy) if step.accumulates else 0
    return replace(cost, outside=cost.outside._replace(bytes=cost.outside.bytes + held))


def rehearse_reference(policy: nn.Module, pairs: Pairs, score: Run, *, memory: int) -> PassCost:
    """What a pass without gradients costs under `score`; else as above."""
    with _as_it_was(policy):
        policy.eval()
        return _rehearsed(policy, pairs, score, memory)


def shortened(pairs: Pairs, share: float) -> list[TokenizedPair]:
    """Pairs with this share of each text, at least two tokens of it if there are."""

    def part(tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tokens[: max(2, round(share * len(tokens)))]

    return [
        replace(p, prompt=part(p.prompt), chosen=part(p.chosen), rejected=part(p.rejected))
        for p in pairs
    ]


def _rehearsed(policy: nn.Module, pairs: Pairs, run: Run, memory: int) -> PassCost:
    """The pass through samples of the blocks; through all where the model does not run on some."""
    try:
        return _drawn_out(policy, sample(policy), pairs, run, memory)
    except (NotCutError, *UNSUITED):
        return _drawn_out(policy, whole(policy), pairs, run, memory)


def _drawn_out(policy: nn.Module, chosen: Sample, pairs: Pairs, run: Run, memory: int) -> PassCost:
    """Bytes and seconds of two samples, as a line in the number of blocks."""
    with only(policy, chosen.large):
        mx.eval(policy.parameters())  # of a model that was built without weights, only these
        share = _fitting_share(pairs, run, memory)
        used = pairs if share == 1 else shortened(pairs, share)
        costs = _repeated(run, used)
    large, more = _least(costs), len(chosen.large)
    small, fewer = Cost(0, 0), 0  # if all blocks ran, there is nothing to be concluded
    if not chosen.is_whole:
        with only(policy, chosen.small):
            small, fewer = _least(_repeated(run, used)), len(chosen.small)
    # Noise must not make the whole cheaper than its part.
    block = Cost(*(max(0.0, (b - a) / (more - fewer)) for a, b in zip(small, large, strict=True)))
    usual = Cost(sorted(cost.bytes for cost in costs)[len(costs) // 2], large.seconds)
    outside = Cost(*(b - more * each for b, each in zip(usual, block, strict=True)))
    return PassCost(
        outside=Cost(*(value / share for value in outside)),
        block=Cost(*(value / share for value in block)),
        blocks=chosen.count if fewer else more,
        share=share,
    )


def _fitting_share(pairs: Pairs, run: Run, memory: int) -> float:
    """The share of the texts for which there is room; kernels are compiled on the way."""
    free = memory - mx.get_active_memory()
    for part, following in pairwise(PARTS):
        needed = _measured(run, shortened(pairs, part)).bytes * MARGIN / part
        if needed <= free:
            return 1.0
        if needed * following > free:
            break
    return part


def _repeated(run: Run, pairs: Pairs) -> list[Cost]:
    return [_measured(run, pairs) for _ in range(REPEATS)]


def _least(costs: Sequence[Cost]) -> Cost:
    """The least of several runs, in bytes and in seconds."""
    return Cost(min(cost.bytes for cost in costs), min(cost.seconds for cost in costs))


def _measured(run: Run, pairs: Pairs) -> Cost:
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    began = perf_counter()
    mx.eval(run(pairs))
    seconds = perf_counter() - began
    return Cost(mx.get_peak_memory() - before, seconds)


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


EVIDENT = 0.15  # of what a block keeps: a smaller part that grows with the square is noise


@dataclass(frozen=True)
class Sized:
    """A measured pass: so many pairs, and the tokens of each."""

    cost: PassCost
    pairs: int
    tokens: float

    @property
    def kept(self) -> float:
        """What a block keeps of a token."""
        return self.cost.block.bytes / (self.pairs * self.tokens)


@dataclass(frozen=True)
class Growth:
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


def growth(long: Sized, short: Sized) -> Growth:
    """The curve through both: a line, unless a part that grows with the square is evident."""
    square = 0.0
    if long.tokens > short.tokens:
        square = max(0.0, (long.kept - short.kept) / (long.tokens - short.tokens))
    if square * long.tokens < EVIDENT * long.kept:
        square = 0.0
    more = long.pairs * long.tokens - short.pairs * short.tokens
    gained = long.cost.outside.bytes - short.cost.outside.bytes
    slope = max(0.0, gained / more) if more > 0 else 0.0
    return Growth(
        outside=long.cost.outside.bytes - slope * long.pairs * long.tokens,
        slope=slope,
        linear=long.kept - square * long.tokens,
        square=square,
        blocks=long.cost.blocks,
    )


def largest(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest number up to `most` that fits, 0 if not even 1 does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
