"""Preference losses of one number a pair, how far chosen is ahead; one loss per pair out.

Pure MLX. No model, no config object, no mean, no printing: reduction and reporting
belong to the caller. `more` is what the data asks for beyond zero: it is taken from beta
times the margin, in the units of a reward (ODPO: Amini et al. 2024, arXiv:2402.10571, Eq. 8).
"""

import math

import mlx.core as mx
import mlx.nn as nn

More = mx.array | float


def sigmoid_loss(
    margin: mx.array, *, beta: float, label_smoothing: float = 0.0, more: More = 0.0
) -> mx.array:
    """DPO loss. (B,) -> (B,)

        loss = -(1 - eps) log sigmoid(x) - eps log sigmoid(-x),  x = beta m - more

    where m is the log-ratio margin and eps the share of labels taken to be flipped.
    TRL ignores `label_smoothing` for its `sigmoid` loss; here it acts (conservative DPO).
    Of averages per token this is `sigmoid_norm`, of average log-probabilities `simpo`.

    Args:
        margin: Log-ratio margins in nats, from `views.log_ratio_margin`.
        beta: Strength of the pull back to the reference, above 0.
        label_smoothing: eps, in [0, 0.5). Zero is the loss of the paper.
        more: Wanted beyond zero. (B,)

    Sources:
        eps = 0: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
        eps > 0: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO".
    """
    x = beta * margin - more
    kept = -nn.log_sigmoid(x)
    flipped = -nn.log_sigmoid(-x)
    return (1 - label_smoothing) * kept + label_smoothing * flipped


def robust_loss(
    margin: mx.array, *, beta: float, label_smoothing: float, more: More = 0.0
) -> mx.array:
    """DPO loss whose mean over flipped labels is that over clean ones. (B,) -> (B,)

        loss = [-(1 - eps) log sigmoid(x) + eps log sigmoid(-x)] / (1 - 2 eps),  x = beta m - more

    It may be negative, and falls without end as a pair is got wrong by more and more labels.

    Source: Ray Chowdhury et al. 2024, arXiv:2403.00409.
    """
    x = beta * margin - more
    kept, flipped = -nn.log_sigmoid(x), -nn.log_sigmoid(-x)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(margin: mx.array, *, beta: float, more: More = 0.0) -> mx.array:
    """max(0, 1 - (beta m - more)). (B,) -> (B,)

    Source: Zhao et al. 2023, arXiv:2305.10425, with log-ratios as in Liu et al. 2023,
    arXiv:2309.06657.
    """
    return nn.relu(1 - (beta * margin - more))


def ipo_loss(margin: mx.array, *, beta: float) -> mx.array:
    """Squared distance of the margin from 1 / (2 beta). (B,) -> (B,)

    Args:
        margin: Of log-ratios averaged over the tokens of each completion. The paper has sums;
            its authors told TRL that their results were with averages, and so it is here.
        beta: The paper's tau.

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    return mx.square(margin - 1 / (2 * beta))


def exo_pair_loss(margin: mx.array, *, beta: float, label_smoothing: float) -> mx.array:
    """KL divergence of the policy's preference from the labels' (1 - eps, eps). (B,) -> (B,)

        loss = sigmoid(x) [log sigmoid(x) - log(1 - eps)]
             + sigmoid(-x) [log sigmoid(-x) - log eps],  x = beta m

    Args:
        margin: Log-ratio margins in nats.
        beta: The paper's beta_pi.
        label_smoothing: eps, above 0, for the divergence from a sure label is infinite.

    Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    x = beta * margin
    kept = mx.sigmoid(x) * (nn.log_sigmoid(x) - math.log1p(-label_smoothing))
    flipped = mx.sigmoid(-x) * (nn.log_sigmoid(-x) - math.log(label_smoothing))
    return kept + flipped


def discopop_loss(margin: mx.array, *, beta: float, discopop_tau: float) -> mx.array:
    """Logistic and exponential loss, mixed by the margin itself. (B,) -> (B,)

        loss = (1 - mu) (-log sigmoid(x)) + mu exp(-x),  mu = sigmoid(x / tau),  x = beta m

    For tau up to 1 the exponential is bounded by its share; it is computed as one power, so
    that it does not overflow before mu vanishes.

    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5; tau 0.05 there.
    """
    x = beta * margin
    logistic = mx.sigmoid(-x / discopop_tau) * -nn.log_sigmoid(x)
    return logistic + mx.exp(nn.log_sigmoid(x / discopop_tau) - x)


def dpop_loss(
    margin: mx.array, chosen: mx.array, *, beta: float, dpop_lambda: float, more: More = 0.0
) -> mx.array:
    """DPO loss that minds a chosen completion getting less likely. (B,), (B,) -> (B,)

        loss = -log sigmoid(beta (m - lambda max(0, -r)) - more)

    Args:
        margin: Log-ratio margins in nats.
        chosen: r, the chosen completions' log-ratios.
        beta: Strength of the pull back to the reference.
        dpop_lambda: The penalty of a nat lost.
        more: Wanted beyond zero. (B,)

    Source: Pal et al. 2024, arXiv:2402.13228: the penalty stands inside the sigmoid.
    """
    return sigmoid_loss(margin - dpop_lambda * nn.relu(-chosen), beta=beta, more=more)
