"""Compare methods by the reward that they reach within KL divergences, from rows.

A row is a measured policy with its `method`, `reward` and `kl`; those of the method `optimal` are
the frontier, in the order of falling KL.
"""

from collections.abc import Sequence

import numpy as np

from scripts.studies.reporting.study import Rows, column, of

LEVELS = (0.5, 0.75, 1.0, 1.5, 2.0)  # nats
NEAR = (0.1, 0.2, 0.3)  # nats, of levels that preferred fine-tuning reaches with every seed


def frontier(rows: Rows, kl: float) -> float:
    """Return the highest mean reward of any policy with this KL divergence."""
    best = of(rows, method="optimal")[::-1]
    return float(np.interp(kl, column(best, "kl"), column(best, "reward")))


def best_within(rows: Rows, method: str, kl: float) -> float:
    """Return the highest reward that a method's policies reach with at most this KL, if mixed.

    This is their upper concave hull, the base model included: KL is convex, so that a policy which
    follows one of two at random has at most the mean of their KL divergences.
    """
    known = [*of(rows, method=method), *of(rows, method="base")]
    points = np.array([column(known, "kl"), column(known, "reward")]).T
    near, far = points[points[:, 0] <= kl], points[points[:, 0] > kl]
    mixed = [
        low + (high - low) * (kl - left) / (right - left)
        for left, low in near
        for right, high in far
    ]
    return float(max([*near[:, 1], *mixed]))


def lead(rows: Rows, first: str, second: str, levels: Sequence[float] = LEVELS) -> list[float]:
    """Return how much reward a method has more than another, at each of the levels."""
    return [best_within(rows, first, kl) - best_within(rows, second, kl) for kl in levels]


def smallest_lead(rows: Rows, second: str) -> float:
    """Return the smallest lead of DPO over a method, of all levels."""
    return min(lead(rows, "dpo", second))


def mean_lead(rows: Rows, second: str, levels: Sequence[float] = LEVELS) -> float:
    """Return the mean lead of DPO over a method."""
    return float(np.mean(lead(rows, "dpo", second, levels)))


def mean_reward(rows: Rows, method: str) -> float:
    """Return the best reward of a method within each of `LEVELS`, on average."""
    return float(np.mean([best_within(rows, method, kl) for kl in LEVELS]))


def gap(rows: Rows, method: str) -> float:
    """Return the mean distance of a method below the frontier, at `LEVELS`."""
    return float(np.mean([frontier(rows, kl) for kl in LEVELS])) - mean_reward(rows, method)


def largest_excess(rows: Rows) -> float:
    """Return how far the best policy of all is above the frontier; positive is impossible."""
    return max(
        float(row["reward"]) - frontier(rows, float(row["kl"]))
        for row in rows
        if row["method"] != "optimal"
    )


def last_rows(rows: Rows, method: str, setting: float | None = None) -> Rows:
    """Return the rows of the last steps of a method."""
    rows = [row for row in of(rows, method=method) if setting in (None, row["setting"])]
    last = max(float(row["step"]) for row in rows)
    return [row for row in rows if float(row["step"]) == last]


def last_mean(rows: Rows, method: str, name: str) -> float:
    """Return the mean of a column over the last steps of a method."""
    return float(np.mean(column(last_rows(rows, method), name)))


def best_of_gap(rows: Rows) -> float:
    """Return the largest distance of best of N by true reward below the frontier."""
    return max(
        frontier(rows, float(row["kl"])) - float(row["reward"])
        for row in of(rows, method="best_true")
    )


def token_ratio(rows: Rows) -> float:
    """Return the trained tokens of PPO with a learned reward, divided by those of DPO."""
    names = ("ppo_learned", "dpo")
    learned, direct = (last_mean(rows, name, "trained_tokens") for name in names)
    return learned / direct
