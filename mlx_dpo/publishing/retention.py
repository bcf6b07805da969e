"""How much of a policy's training is left in another form of it: log-probabilities in, shares out.

Source of the danger: a change that is smaller than what quantised weights tell apart is rounded
away (docs/notes.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_dpo.types import PairLogps, TokenizedPair

Values = np.ndarray  # (n,) float64


@dataclass(frozen=True)
class Retention:
    """A policy and its other form on the same pairs."""

    pairs: int
    margin_before: float  # mean over pairs of the log-ratio margin, nats
    margin_after: float
    margin: float  # the share that is left
    change: float  # share of the change of the completions' log-probabilities that is left
    apart: float  # mean absolute difference of the two's log-probabilities, nats a token

    @property
    def least(self) -> float:
        """The smaller share; of the margin only where there was one."""
        return min(self.margin, self.change) if self.margin_before > 0 else self.change


def retention(
    pairs: Sequence[TokenizedPair], reference: PairLogps, policy: PairLogps, other: PairLogps
) -> Retention:
    """What `other` keeps of the way from `reference` to `policy`.

    The change that is left is projected on the whole one. Noise adds nothing to that on average,
    but much to a small change, up or down: a share far above one says as little as one below.
    """
    moved, left = _moved(pairs, reference, policy), _moved(pairs, reference, other)
    before, after = _margins(pairs, moved).mean(), _margins(pairs, left).mean()
    tokens = sum(map(sum, _tokens(pairs)))
    size = float((moved * moved).sum())
    return Retention(
        pairs=len(pairs),
        margin_before=float(before),
        margin_after=float(after),
        margin=float(after / before) if before else 0.0,
        change=float((moved * left).sum()) / size if size else 0.0,
        apart=float(np.abs(moved - left).sum()) / tokens,
    )


def _labelled(pairs: Sequence[TokenizedPair]) -> bool:
    return pairs[0].desirable is not None


def _moved(pairs: Sequence[TokenizedPair], start: PairLogps, end: PairLogps) -> Values:
    """Log-ratios of the completions that the pairs judge. (1 or 2, len(pairs))"""
    rows = [np.array(e) - np.array(s) for s, e in zip(start, end, strict=True)]
    return np.array(rows[:1] if _labelled(pairs) else rows, np.float64)


def _margins(pairs: Sequence[TokenizedPair], moved: Values) -> Values:
    if _labelled(pairs):
        return moved[0] * np.array([1.0 if pair.desirable else -1.0 for pair in pairs])
    return moved[0] - moved[1]


def _tokens(pairs: Sequence[TokenizedPair]) -> list[tuple[int, ...]]:
    if _labelled(pairs):
        return [(len(pair.chosen),) for pair in pairs]
    return [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
