"""What losses want to know of pairs beside their log-probabilities, as arrays."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_dpo.types import PairFacts, TokenizedPair


def facts_of(pairs: Sequence[TokenizedPair]) -> PairFacts:
    """Of the pairs that a loss is a mean of: all of a step, or of an evaluation. (B,) each"""
    chosen = mx.array([float(len(pair.chosen)) for pair in pairs])
    return PairFacts(
        chosen_tokens=chosen,
        rejected_tokens=mx.array([float(len(pair.rejected)) for pair in pairs]),
        mean_chosen_tokens=chosen.mean(),
        margins=mx.array([pair.margin for pair in pairs]),
        weights=mx.array([pair.weight for pair in pairs]),
        desirable=mx.array([pair.desirable is not False for pair in pairs]),
    )


def some_of(facts: PairFacts, at: mx.array) -> PairFacts:
    """The facts of the pairs at these places. (b,) each; the mean stays that of all."""
    taken = {
        name: value if value.ndim == 0 else value[at] for name, value in facts._asdict().items()
    }
    return PairFacts(**taken)
