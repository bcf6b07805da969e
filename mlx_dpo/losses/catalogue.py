"""All losses by name. Each loss is declared below its function, in the module of the function."""

from collections.abc import Mapping

from mlx_dpo.losses import listwise, optimal_transport, pairwise, pointwise, reference_free
from mlx_dpo.losses.loss import Loss

LEGEND = (
    "w is the chosen completion and l the rejected one, |y| the number of tokens of y; logπ(y) is "
    "the policy's log-probability, r(y) = logπ(y) − logπ_ref(y), Δ = r(w) − r(l); β is beta, "
    "ε label_smoothing, and σ(x) = 1 / (1 + exp(−x))"
)

LOSSES: Mapping[str, Loss] = {
    loss.name: loss
    for loss in (
        *pairwise.LOSSES,
        *pointwise.LOSSES,
        *reference_free.LOSSES,
        *optimal_transport.LOSSES,
        *listwise.LOSSES,
    )
}
