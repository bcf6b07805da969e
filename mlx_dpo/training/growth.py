"""How the memory of a pass grows with its tokens, drawn through two passes that were measured.

Arithmetic alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mlx_dpo.training.rehearsal import PassCost

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
