"""How often one of two answers is preferred: a rate, its interval, and the same at equal length.

Numbers in, numbers out; who judged is not known here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of a two-sided interval of 95 %
WIN, TIE, LOSS = 1.0, 0.5, 0.0
LENGTH_RIDGE = 1.0  # on the weight of length, in units of its own spread
ROUNDS = 100


@dataclass(frozen=True, slots=True)
class WinRate:
    """The share of prompts on which one side is preferred; a tie is half a win."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float  # of the interval of 95 %
    high: float
    length_controlled: float | None  # None where all pairs of answers differ alike in length

    @property
    def count(self) -> int:
        """Prompts."""
        return self.wins + self.ties + self.losses


def win_rate(outcomes: Sequence[float], lengths: Sequence[int]) -> WinRate:
    """Of `outcomes` (1 won, 0.5 tied, 0 lost); `lengths` say how much longer that side's answer is.

    Needs at least one outcome.
    """
    count, total = len(outcomes), math.fsum(outcomes)
    low, high = wilson(total, count)
    return WinRate(
        wins=sum(value == WIN for value in outcomes),
        ties=sum(value == TIE for value in outcomes),
        losses=sum(value == LOSS for value in outcomes),
        rate=total / count,
        low=low,
        high=high,
        length_controlled=length_controlled(outcomes, lengths),
    )


def wilson(total: float, count: int, *, z: float = Z) -> tuple[float, float]:
    """Interval for the mean of `count` outcomes that sum to `total`.

        (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

    Exactly 0 and 1 stay possible and the ends stay inside of them. Ties spread less than wins
    and losses of the same mean, so that with ties it is rather too wide than too narrow.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.
    """
    p = total / count
    scale = 1 + z * z / count
    middle = (p + z * z / (2 * count)) / scale
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def length_controlled(outcomes: Sequence[float], lengths: Sequence[int]) -> float | None:
    """The rate at equal length: σ(a) of the regression that follows, or None without spread.

        log-odds of an outcome = a + b tanh(d / std(d)),  d = difference in length

    fitted by maximum likelihood, with one tie at equal length added and a ridge on b, so that a
    and b stay finite where one side wins everything or length decides everything.

    Source: Dubois et al. 2024, arXiv:2404.04475, section 3 (AlpacaEval 2), without its term
    for the difficulty of an instruction, which needs many models.
    """
    d = np.asarray(lengths, float)
    spread = d.std()
    if spread == 0:
        return None
    x = np.append(np.tanh(d / spread), 0.0)
    y = np.append(np.asarray(outcomes, float), TIE)
    design = np.stack([np.ones_like(x), x], axis=1)
    ridge = np.array([0.0, LENGTH_RIDGE])
    weights = np.zeros(2)
    for _ in range(ROUNDS):
        p = 1 / (1 + np.exp(-design @ weights))
        slope = design.T @ (y - p) - ridge * weights
        curve = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(curve, slope)
        weights = weights + step * min(1.0, 2.0 / max(1e-12, np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))
