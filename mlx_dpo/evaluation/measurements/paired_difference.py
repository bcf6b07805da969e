"""Differences between base and aligned model on the same items, with confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from mlx_dpo.evaluation.winrate import Z_95


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference, aligned minus base, with its 95 % interval; None for a single item."""

    mean: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as JSON values."""
        interval = None if self.low is None else [self.low, self.high]
        return {"mean": self.mean, "interval_95": interval}


def paired_difference(base: Sequence[float], aligned: Sequence[float]) -> PairedDifference:
    """Return the mean difference of two models' values on the same items. (n,), (n,)

        d ± 1.96 s / sqrt(n),  d and s: mean and standard deviation of aligned - base per item

    Differences per item leave out what makes items easy or hard for both models, so the interval
    is narrower than one from two separate standard errors. It is a normal approximation, too
    narrow for fewer than about 30 items.

    Source: Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, section 4.2.
    """
    differences = [after - before for before, after in zip(base, aligned, strict=True)]
    mean = fmean(differences)
    if len(differences) < 2:
        return PairedDifference(mean, None, None)
    half = Z_95 * stdev(differences) / math.sqrt(len(differences))
    return PairedDifference(mean, mean - half, mean + half)
