"""Losses of distributions: not each pair, but the sorted values of a step are compared.

Each term is the loss of the pair whose value stands in it, in the order of the pairs; means and
gradients are those of the sorted terms.
"""

import mlx.core as mx

from mlx_dpo.losses.pairwise import sigmoid_loss
from mlx_dpo.types import PairLogps


def aot_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0
) -> mx.array:
    """The policy's margins are to lie above the reference's, as distributions. (B,)

    `sigmoid_loss` of the k-th of logπ(w) - logπ(l) less the k-th of the reference's.

    Source: Melnyk et al. 2024, arXiv:2406.05882, paired.
    """
    return _above(
        policy.chosen - policy.rejected,
        reference.chosen - reference.rejected,
        beta=beta,
        label_smoothing=label_smoothing,
    )


def aot_unpaired_loss(
    chosen: mx.array, rejected: mx.array, *, beta: float, label_smoothing: float = 0.0
) -> mx.array:
    """Chosen completions' log-ratios are to lie above the rejected ones'. (B,), (B,) -> (B,)

    `sigmoid_loss` of the k-th of the one less the k-th of the other.

    Source: Melnyk et al. 2024, arXiv:2406.05882, unpaired.
    """
    return _above(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def _above(high: mx.array, low: mx.array, *, beta: float, label_smoothing: float) -> mx.array:
    ranks = mx.argsort(mx.argsort(mx.stop_gradient(high)))
    below = low[mx.argsort(mx.stop_gradient(low))][ranks]
    return sigmoid_loss(high - below, beta=beta, label_smoothing=label_smoothing)
