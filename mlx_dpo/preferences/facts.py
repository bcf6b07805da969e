"""What losses want to know of pairs beside their log-probabilities, as arrays."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dpo.preferences.columns import LABEL, LENGTHS, TOLD, column
from mlx_dpo.types import PairFacts, TokenizedPair


def facts_of(pairs: Sequence[TokenizedPair]) -> PairFacts:
    """Of the pairs that a loss is a mean of: all of a step, or of an evaluation. (B,) each"""
    lengths, told = (column(pairs, name).astype(np.float32) for name in (LENGTHS, TOLD))
    chosen = mx.array(lengths[:, 1])
    return PairFacts(
        chosen_tokens=chosen,
        rejected_tokens=mx.array(lengths[:, 2]),
        mean_chosen_tokens=chosen.mean(),
        margins=mx.array(told[:, 0]),
        weights=mx.array(told[:, 1]),
        desirable=mx.array(column(pairs, LABEL) != 0),
    )


def some_of(facts: PairFacts, at: mx.array) -> PairFacts:
    """The facts of the pairs at these places. (b,) each; the mean stays that of all."""
    taken = {
        name: value if value.ndim == 0 else value[at] for name, value in facts._asdict().items()
    }
    return PairFacts(**taken)
