"""AOT losses: they compare the sorted values of all pairs of a step instead of single pairs.

A term of the loss subtracts two sorted values, which may come from different pairs. The term is
returned at the index of the pair of its first value. The mean does not depend on this choice.
"""

import mlx.core as mx

from mlx_dpo.losses.loss import BETA, Loss
from mlx_dpo.losses.pairwise import sigmoid_loss
from mlx_dpo.types import PairLogps


def aot_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0
) -> mx.array:
    """Return the AOT loss: the policy's margins should dominate the reference's. (B,)

    Each term is `sigmoid_loss` of the k-th smallest margin of the policy minus the k-th smallest
    margin of the reference. A margin is the log-probability of chosen minus that of rejected.

    Source: Melnyk et al. 2024, arXiv:2406.05882, paired.
    """
    return _dominance_loss(
        policy.chosen - policy.rejected,
        reference.chosen - reference.rejected,
        beta=beta,
        label_smoothing=label_smoothing,
    )


def aot_unpaired_loss(
    chosen: mx.array, rejected: mx.array, *, beta: float, label_smoothing: float = 0.0
) -> mx.array:
    """Return the unpaired AOT loss: log-ratios of chosen should dominate those of rejected. (B,)

    Each term is `sigmoid_loss` of the k-th smallest log-ratio of a chosen completion minus the
    k-th smallest log-ratio of a rejected completion.

    Source: Melnyk et al. 2024, arXiv:2406.05882, unpaired.
    """
    return _dominance_loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def _dominance_loss(
    high: mx.array, low: mx.array, *, beta: float, label_smoothing: float
) -> mx.array:
    ranks = mx.argsort(mx.argsort(mx.stop_gradient(high)))
    matched = low[mx.argsort(mx.stop_gradient(low))][ranks]
    return sigmoid_loss(high - matched, beta=beta, label_smoothing=label_smoothing)


LOSSES = (
    Loss(
        name="aot",
        function=lambda pairs, s: aot_loss(
            pairs.policy, pairs.reference, beta=s.beta, label_smoothing=s.label_smoothing
        ),
        equation="−(1−ε) log σ(βδ) − ε log σ(−βδ), δ: policy's margins minus the reference's, "
        "both sorted",
        source="AOT, paired: Melnyk et al. 2024, arXiv:2406.05882",
        use="The distribution of margins should improve, not each margin; large batches.",
        defaults=BETA | {"label_smoothing": 0.0},
        uses_whole_batch=True,
    ),
    Loss(
        name="aot_unpaired",
        function=lambda pairs, s: aot_unpaired_loss(
            pairs.log_ratios.chosen,
            pairs.log_ratios.rejected,
            beta=s.beta,
            label_smoothing=s.label_smoothing,
        ),
        equation="−(1−ε) log σ(βδ) − ε log σ(−βδ), δ: r(w) minus r(l), both sorted",
        source="AOT, unpaired: Melnyk et al. 2024, arXiv:2406.05882",
        use="Like aot, when chosen and rejected do not belong together.",
        defaults=BETA | {"label_smoothing": 0.0},
        uses_whole_batch=True,
    ),
)
