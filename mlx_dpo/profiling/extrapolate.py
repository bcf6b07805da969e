"""Estimate the memory and time of any pass from the profiles of a long and a short pass.

A pass is a forward pass, with or without a backward pass. A profile is its memory and time.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mlx_dpo.profiling.profile import PassProfile

# A smaller quadratic share of a layer's memory than this is noise.
QUADRATIC_THRESHOLD = 0.15


@dataclass(frozen=True)
class ProfilePoint:
    """The profile (memory and time) of a pass, with its number of pairs and of tokens per pair."""

    profile: PassProfile
    pairs: int
    tokens: float  # per pair

    @property
    def layer_bytes_per_token(self) -> float:
        """Memory that a layer saves for the backward pass, in bytes per token."""
        return self.profile.per_layer.bytes / (self.pairs * self.tokens)


@dataclass(frozen=True)
class MemoryCurve:
    """Peak memory of a pass as a function of its pairs and their tokens.

    For m pairs of t tokens each, the peak memory in bytes is

        fixed + per_token m t + num_layers m (linear t + quadratic t^2)
    """

    fixed: float
    per_token: float
    linear: float
    quadratic: float
    num_layers: int

    def bytes(self, pairs: int, tokens: float) -> float:
        """Return the peak memory of a pass in bytes, not counting weights and optimizer state.

        Args:
            pairs: number of pairs.
            tokens: number of tokens per pair.
        """
        layer = self.linear * tokens + self.quadratic * tokens**2
        return self.fixed + self.per_token * pairs * tokens + self.num_layers * pairs * layer


def fit_memory_curve(long: ProfilePoint, short: ProfilePoint) -> MemoryCurve:
    """Fit a memory curve to the profiles of a long and a short pass.

    The curve has a quadratic term only if memory clearly grows faster than linearly.
    """
    quadratic = 0.0
    if long.tokens > short.tokens:
        growth = long.layer_bytes_per_token - short.layer_bytes_per_token
        quadratic = max(0.0, growth / (long.tokens - short.tokens))
    if quadratic * long.tokens < QUADRATIC_THRESHOLD * long.layer_bytes_per_token:
        quadratic = 0.0
    more_tokens = long.pairs * long.tokens - short.pairs * short.tokens
    more_bytes = long.profile.fixed.bytes - short.profile.fixed.bytes
    per_token = max(0.0, more_bytes / more_tokens) if more_tokens > 0 else 0.0
    return MemoryCurve(
        fixed=long.profile.fixed.bytes - per_token * long.pairs * long.tokens,
        per_token=per_token,
        linear=long.layer_bytes_per_token - quadratic * long.tokens,
        quadratic=quadratic,
        num_layers=long.profile.num_layers,
    )


def largest_that_fits(fits: Callable[[int], bool], *, limit: int) -> int:
    """Return the largest number from 1 to `limit` for which `fits` is true; 0 if there is none.

    The search is binary, so if `fits` is true for a number, it must be so for all smaller ones.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


TimedPass = tuple[int, float]  # operations and seconds


def extrapolate_seconds(
    short: TimedPass, long: TimedPass, *, passes: int, operations: int
) -> float:
    """Return the time in seconds of several passes, extrapolated from two measured passes.

    The time of a pass is assumed to be a linear function of its operations.

    Args:
        short: operations and seconds of the measured short pass.
        long: operations and seconds of the measured long pass.
        passes: number of passes.
        operations: number of operations of all these passes together.
    """
    more = long[0] - short[0]
    rate = (long[1] - short[1]) / more if more > 0 else 0.0
    start = short[1] - rate * short[0]
    if rate <= 0 or start < 0:  # noise: assume proportionality
        rate, start = long[1] / long[0], 0.0
    return start * passes + rate * operations
