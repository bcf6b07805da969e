"""Profile a pass: measure memory and time of the real computation on a few layers of the model.

A formula for the memory of a backward pass holds for one architecture on one device only. So the
real pass, with all its memory savings, runs through a small and a large subset of the layers, and
the measurements are extrapolated to all layers. Layers run one after another and each layer saves
as much as the next, so peak memory is linear in the number of layers.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.models.restore import module_modes, preserved_random_state
from mlx_dpo.profiling.layer_subset import (
    LayersNotFoundError,
    LayerSubsets,
    all_layers,
    choose_layer_subsets,
    with_layers,
)
from mlx_dpo.profiling.memory import trainable_bytes
from mlx_dpo.scoring.equivalence import UNSUPPORTED_ERRORS
from mlx_dpo.scoring.scorers import Scorer, memory_efficient_training
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch
from mlx_dpo.training.step import loss_and_gradients
from mlx_dpo.types import PairLogps, TokenizedPair

# Shares of each text, tried in order until whole texts are known to fit into memory.
TRIAL_SHARES = (1 / 16, 1 / 4, 1 / 2, 1)
SAFETY_FACTOR = 2  # by which the memory estimated from shortened texts may be too low
REPEATS = 3  # MLX runs ahead asynchronously, sometimes one array further than usual
# Shares of each text from which the memory of whole texts is extrapolated.
SHORT_SHARES = (1 / 8, 1 / 4)

Pairs = Sequence[TokenizedPair]
PassFunction = Callable[[Pairs], Any]  # a pass over pairs; returns the arrays to evaluate


class Usage(NamedTuple):
    """Peak memory in bytes and time in seconds of a computation."""

    bytes: float  # peak memory, beyond what was in use before
    seconds: float


@dataclass(frozen=True)
class PassProfile:
    """Memory and time of a pass through the whole model, extrapolated from some of its layers."""

    fixed: Usage  # independent of the number of layers: the head, and intermediate arrays
    per_layer: Usage
    num_layers: int  # of the whole model
    text_share: float = 1.0  # below 1 if whole texts might not have fitted into memory

    @property
    def bytes(self) -> int:
        """Peak memory of the pass in bytes, not counting weights and optimizer state."""
        return int(self.fixed.bytes + self.num_layers * self.per_layer.bytes)

    @property
    def seconds(self) -> float:
        """Duration of the pass in seconds."""
        return self.fixed.seconds + self.num_layers * self.per_layer.seconds


@dataclass(frozen=True, kw_only=True)
class TrainingPass:
    """Settings of the forward and backward pass that is profiled."""

    scorer: Scorer
    objective: Objective
    accumulates: bool  # whether a step has several passes, so that gradients are held in between
    recompute: bool = False


def profile_training_pass(
    policy: nn.Module,
    pairs: Pairs,
    settings: TrainingPass,
    *,
    memory: int,
    repeats: int = REPEATS,
) -> PassProfile:
    """Measure memory and time of a forward and backward pass over `pairs`.

    The adapters of the policy must be attached. The policy and MLX's random state stay unchanged;
    MLX's peak memory counter is reset.

    Args:
        memory: number of bytes that may be used. Pairs are shortened if they might need more.
        repeats: how often each pass runs.
    """

    def run(pairs: Pairs) -> Any:
        zeros = mx.zeros((len(pairs),))
        batch = MicroBatch.of(pairs, PairLogps(zeros, zeros))
        with memory_efficient_training(policy, recompute=settings.recompute):
            return loss_and_gradients(policy, settings.objective, [batch], scorer=settings.scorer)

    with module_modes(policy), preserved_random_state():
        policy.train()
        profile = _profile_pass(policy, pairs, run, memory, repeats)
    accumulated = trainable_bytes(policy) if settings.accumulates else 0
    fixed = profile.fixed._replace(bytes=profile.fixed.bytes + accumulated)
    return replace(profile, fixed=fixed)


def profile_inference_pass(
    policy: nn.Module, pairs: Pairs, score: PassFunction, *, memory: int
) -> PassProfile:
    """Measure memory and time of `score`, a pass over `pairs` without gradients.

    The policy and MLX's random state stay unchanged; MLX's peak memory counter is reset.

    Args:
        memory: number of bytes that may be used. Pairs are shortened if they might need more.
    """
    with module_modes(policy), preserved_random_state():
        policy.eval()
        return _profile_pass(policy, pairs, score, memory)


def shorten_pairs(pairs: Pairs, share: float) -> list[TokenizedPair]:
    """Return the pairs with each text cut to `share` of its tokens, but not below two tokens."""

    def shorter(tokens: tuple[int, ...]) -> int:
        return max(2, round(share * len(tokens)))

    return [
        replace(
            pair.cut_completions(shorter(pair.chosen), shorter(pair.rejected)),
            prompt=pair.prompt[: shorter(pair.prompt)],
        )
        for pair in pairs
    ]


def extrapolate_from_short_texts(
    measure: Callable[[Pairs], PassProfile], pairs: Pairs
) -> int | None:
    """Return the peak memory in bytes of a pass over `pairs`, from two passes over shortened texts.

    The memory is assumed to grow with the length of the texts, linearly or quadratically; if the
    measurements have a constant part, the result is too high. The result is None if not even the
    shortened texts fit into memory.

    Args:
        measure: function that profiles a pass over pairs.
    """
    profiles = [measure(shorten_pairs(pairs, share)) for share in SHORT_SHARES]
    if any(profile.text_share < 1 for profile in profiles):
        return None
    short, long = SHORT_SHARES
    rate_of_short, rate = profiles[0].bytes / short, profiles[1].bytes / long  # of whole texts
    growth = max(0.0, (rate - rate_of_short) / (long - short))
    return int(rate + growth * (1 - long))


def _profile_pass(
    policy: nn.Module, pairs: Pairs, run: PassFunction, memory: int, repeats: int = REPEATS
) -> PassProfile:
    """Measure the pass `run` on a few layers and extrapolate to all layers.

    If the model does not run on a few layers, all layers are measured.
    """
    gc.collect()  # arrays in reference cycles that are freed meanwhile would lower the peak
    try:
        subsets = choose_layer_subsets(policy)
        return _extrapolate_layers(policy, subsets, pairs, run, memory, repeats)
    except (LayersNotFoundError, *UNSUPPORTED_ERRORS):
        return _extrapolate_layers(policy, all_layers(policy), pairs, run, memory, repeats)


def _extrapolate_layers(
    policy: nn.Module,
    subsets: LayerSubsets,
    pairs: Pairs,
    run: PassFunction,
    memory: int,
    repeats: int,
) -> PassProfile:
    """Measure the pass `run` on two subsets of the layers and extrapolate linearly to all layers.

    If the large subset contains all layers, or no more than the small one, only the large subset is
    measured.
    """
    with with_layers(policy, subsets.large):
        mx.eval(policy.parameters())  # allocates lazy random weights for these layers only
        share = _share_that_fits(pairs, run, memory)
        measured_pairs = pairs if share == 1 else shorten_pairs(pairs, share)
        large_runs = _measure_repeatedly(run, measured_pairs, repeats)
    large, num_large = _minimum(large_runs), len(subsets.large)
    small, num_small = Usage(0, 0), 0  # if all layers ran, there is nothing to extrapolate
    if not subsets.is_whole:
        with with_layers(policy, subsets.small):
            small = _minimum(_measure_repeatedly(run, measured_pairs, repeats))
            num_small = len(subsets.small)
    # Noise must not make the whole cheaper than its part.
    per_layer = Usage(
        *(max(0.0, (b - a) / (num_large - num_small)) for a, b in zip(small, large, strict=True))
    )
    median_bytes = sorted(usage.bytes for usage in large_runs)[len(large_runs) // 2]
    typical = Usage(median_bytes, large.seconds)
    fixed = Usage(*(b - num_large * each for b, each in zip(typical, per_layer, strict=True)))
    return PassProfile(
        fixed=Usage(*(value / share for value in fixed)),
        per_layer=Usage(*(value / share for value in per_layer)),
        num_layers=subsets.count if num_small else num_large,
        text_share=share,
    )


def _share_that_fits(pairs: Pairs, run: PassFunction, memory: int) -> float:
    """Return the share of each text's tokens, from 0 to 1, that can run in `memory` bytes.

    The share is found by trial runs on shortened texts, which also compile the kernels.
    """
    free = memory - mx.get_active_memory()
    for share, next_share in pairwise(TRIAL_SHARES):
        estimated = _measure(run, shorten_pairs(pairs, share)).bytes * SAFETY_FACTOR / share
        if estimated <= free:
            return 1.0
        if estimated * next_share > free:
            break
    return share


def _measure_repeatedly(run: PassFunction, pairs: Pairs, repeats: int) -> list[Usage]:
    """Run `run(pairs)` several times; return the peak memory and time of each run."""
    return [_measure(run, pairs) for _ in range(repeats)]


def _minimum(usages: Sequence[Usage]) -> Usage:
    """Return the minimum memory and the minimum time of several runs, possibly of two runs."""
    return Usage(min(usage.bytes for usage in usages), min(usage.seconds for usage in usages))


def _measure(run: PassFunction, pairs: Pairs) -> Usage:
    """Run `run(pairs)` once and return its peak memory and time."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = perf_counter()
    mx.eval(run(pairs))
    seconds = perf_counter() - start
    return Usage(mx.get_peak_memory() - before, seconds)
