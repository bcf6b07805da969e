"""Losses of the margin between chosen and rejected: DPO and its relatives. (B,) -> (B,)

The functions are pure MLX and return one loss per pair; the caller takes the mean. `offset` is
the target reward margin of a pair, subtracted from beta times the margin (ODPO: Amini et al.
2024, arXiv:2402.10571, Eq. 8).
"""

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.losses.loss import BETA, Loss

Offset = mx.array | float


def sigmoid_loss(
    margin: mx.array, *, beta: float, label_smoothing: float = 0.0, offset: Offset = 0.0
) -> mx.array:
    """Return the DPO loss. (B,) -> (B,)

        loss = -(1 - eps) log sigmoid(x) - eps log sigmoid(-x),  x = beta m - offset

    where m is the log-ratio margin and eps is the assumed share of flipped labels. TRL ignores
    `label_smoothing` for its `sigmoid` loss; here it takes effect (conservative DPO). For
    log-ratios averaged over tokens this is the loss `sigmoid_norm`.

    Args:
        margin: Log-ratio margins in nats, from `log_ratios.log_ratio_margin`.
        beta: Strength of the KL constraint, above 0.
        label_smoothing: eps, in [0, 0.5). Zero is the loss of the paper.
        offset: Target reward margin. (B,)

    Examples:
        >>> import mlx.core as mx
        >>> losses = sigmoid_loss(mx.array([0.0, 10.0, -10.0]), beta=0.1)
        >>> [round(loss, 4) for loss in losses.tolist()]
        [0.6931, 0.3133, 1.3133]

    Sources:
        eps = 0: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
        eps > 0: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO".
    """
    x = beta * margin - offset
    correct = -nn.log_sigmoid(x)
    flipped = -nn.log_sigmoid(-x)
    return (1 - label_smoothing) * correct + label_smoothing * flipped


def robust_loss(
    margin: mx.array, *, beta: float, label_smoothing: float, offset: Offset = 0.0
) -> mx.array:
    """Return the robust DPO loss, an unbiased estimate of the DPO loss on clean labels. (B,)

        loss = [-(1 - eps) log sigmoid(x) + eps log sigmoid(-x)] / (1 - 2 eps),  x = beta m - offset

    where m is the log-ratio margin and eps, the share of flipped labels, is `label_smoothing`.
    The loss may be negative, and it has no lower bound.

    Source: Ray Chowdhury et al. 2024, arXiv:2403.00409.
    """
    x = beta * margin - offset
    correct, flipped = -nn.log_sigmoid(x), -nn.log_sigmoid(-x)
    return ((1 - label_smoothing) * correct - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(margin: mx.array, *, beta: float, offset: Offset = 0.0) -> mx.array:
    """Return the hinge loss max(0, 1 - (beta m - offset)) of the margins m. (B,) -> (B,)

    Source: Zhao et al. 2023, arXiv:2305.10425, with log-ratios as in Liu et al. 2023,
    arXiv:2309.06657.
    """
    return nn.relu(1 - (beta * margin - offset))


def ipo_loss(margin: mx.array, *, beta: float) -> mx.array:
    """Return the IPO loss: squared distance of the margin from 1 / (2 beta). (B,) -> (B,)

    Args:
        margin: Margin of log-ratios averaged over the tokens of each completion. The paper has
            sums; its authors confirmed to TRL that their results used averages.
        beta: The paper's tau.

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    return mx.square(margin - 1 / (2 * beta))


def exo_pair_loss(margin: mx.array, *, beta: float, label_smoothing: float) -> mx.array:
    """Return the EXO loss: KL divergence of the policy from the smoothed labels. (B,) -> (B,)

        loss = sigmoid(x) [log sigmoid(x) - log(1 - eps)]
             + sigmoid(-x) [log sigmoid(-x) - log eps],  x = beta m

    Args:
        margin: m, the log-ratio margins in nats.
        beta: The paper's beta_pi.
        label_smoothing: eps, above 0: the divergence from a certain label is infinite.

    Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    x = beta * margin
    correct = mx.sigmoid(x) * (nn.log_sigmoid(x) - math.log1p(-label_smoothing))
    flipped = mx.sigmoid(-x) * (nn.log_sigmoid(-x) - math.log(label_smoothing))
    return correct + flipped


def discopop_loss(margin: mx.array, *, beta: float, discopop_tau: float) -> mx.array:
    """Return the DiscoPOP loss: logistic and exponential loss, mixed by the margin. (B,) -> (B,)

        loss = (1 - mu) (-log sigmoid(x)) + mu exp(-x),  mu = sigmoid(x / tau),  x = beta m

    where m is the log-ratio margin and tau is `discopop_tau`. For tau up to 1 the product
    mu exp(-x) is bounded. It is computed as a single exponential, so that exp(-x) cannot
    overflow before mu vanishes.

    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5; tau 0.05 there.
    """
    x = beta * margin
    logistic = mx.sigmoid(-x / discopop_tau) * -nn.log_sigmoid(x)
    return logistic + mx.exp(nn.log_sigmoid(x / discopop_tau) - x)


def dpop_loss(
    margin: mx.array, chosen: mx.array, *, beta: float, dpop_lambda: float, offset: Offset = 0.0
) -> mx.array:
    """Return the DPOP loss: DPO with a penalty if chosen gets less likely. (B,), (B,) -> (B,)

        loss = -log sigmoid(beta (m - lambda max(0, -r)) - offset)

    Args:
        margin: m, the log-ratio margins in nats.
        chosen: r, the chosen completions' log-ratios.
        beta: Strength of the KL constraint.
        dpop_lambda: Penalty per nat by which the chosen log-ratio is below zero.
        offset: Target reward margin. (B,)

    Source: Pal et al. 2024, arXiv:2402.13228: the penalty is inside the sigmoid.
    """
    return sigmoid_loss(margin - dpop_lambda * nn.relu(-chosen), beta=beta, offset=offset)


LOSSES = (
    Loss(
        name="sigmoid",
        function=lambda pairs, s: sigmoid_loss(
            pairs.margin, beta=s.beta, label_smoothing=s.label_smoothing, offset=pairs.offset
        ),
        equation="−(1−ε) log σ(βΔ) − ε log σ(−βΔ)",
        source="DPO: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7",
        use="The loss to start with.",
        defaults=BETA | {"label_smoothing": 0.0},
        uses_margins=True,
        uses_divergence=True,
    ),
    Loss(
        name="cdpo",
        function=lambda pairs, s: sigmoid_loss(
            pairs.margin, beta=s.beta, label_smoothing=s.label_smoothing, offset=pairs.offset
        ),
        equation="−(1−ε) log σ(βΔ) − ε log σ(−βΔ)",
        source="conservative DPO: Mitchell 2023, A note on DPO with noisy preferences, Eq. 3",
        use="A share ε of the labels is wrong; the margin stops growing at log((1−ε)/ε)/β.",
        defaults=BETA | {"label_smoothing": 0.1},
        uses_margins=True,
        uses_divergence=True,
    ),
    Loss(
        name="robust",
        function=lambda pairs, s: robust_loss(
            pairs.margin, beta=s.beta, label_smoothing=s.label_smoothing, offset=pairs.offset
        ),
        equation="[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)",
        source="rDPO: Ray Chowdhury et al. 2024, arXiv:2403.00409",
        use="A known share ε of the labels is wrong; in expectation it is DPO on clean labels.",
        defaults=BETA | {"label_smoothing": 0.1},
        uses_margins=True,
        uses_divergence=True,
    ),
    Loss(
        name="hinge",
        function=lambda pairs, s: hinge_loss(pairs.margin, beta=s.beta, offset=pairs.offset),
        equation="max(0, 1 − βΔ)",
        source="SLiC-HF: Zhao et al. 2023, arXiv:2305.10425; as RSO: Liu et al. 2023, "
        "arXiv:2309.06657",
        use="Pairs with a sufficient margin should get no gradient.",
        defaults=BETA,
        uses_margins=True,
        uses_divergence=True,
    ),
    Loss(
        name="ipo",
        function=lambda pairs, s: ipo_loss(pairs.margin_per_token, beta=s.beta),
        equation="(r(w)/|w| − r(l)/|l| − 1/(2β))²",
        source="IPO: Azar et al. 2023, arXiv:2310.12036, Eq. 17; an average per token",
        use="Labels are certain, and DPO moves too far from the reference.",
        defaults=BETA,
        uses_divergence=True,
    ),
    Loss(
        name="exo_pair",
        function=lambda pairs, s: exo_pair_loss(
            pairs.margin, beta=s.beta, label_smoothing=s.label_smoothing
        ),
        equation="σ(βΔ) [log σ(βΔ) − log(1−ε)] + σ(−βΔ) [log σ(−βΔ) − log ε]",
        source="EXO: Ji et al. 2024, arXiv:2402.00856, Eq. 16",
        use="The policy should seek a mode of the preferences (reverse KL), not cover them.",
        defaults=BETA | {"label_smoothing": 1e-3},
        uses_divergence=True,
    ),
    Loss(
        name="discopop",
        function=lambda pairs, s: discopop_loss(
            pairs.margin, beta=s.beta, discopop_tau=s.discopop_tau
        ),
        equation="(1−μ) (−log σ(βΔ)) + μ exp(−βΔ), μ = σ(βΔ/τ)",
        source="DiscoPOP: Lu et al. 2024, arXiv:2406.08414, Eq. 5",
        use="A loss that was discovered by an LLM-driven search; τ is `discopop_tau`.",
        defaults=BETA | {"discopop_tau": 0.05},
        uses_divergence=True,
    ),
    Loss(
        name="sigmoid_norm",
        function=lambda pairs, s: sigmoid_loss(
            pairs.margin_per_token, beta=s.beta, offset=pairs.offset
        ),
        equation="−log σ(β (r(w)/|w| − r(l)/|l|))",
        source="length-normalised DPO: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124",
        use="Lengths drive the margins.",
        defaults={"beta": 5.0},
        uses_margins=True,
        uses_divergence=True,
    ),
    Loss(
        name="dpop",
        function=lambda pairs, s: dpop_loss(
            pairs.margin,
            pairs.log_ratios.chosen,
            beta=s.beta,
            dpop_lambda=s.dpop_lambda,
            offset=pairs.offset,
        ),
        equation="−log σ(β (Δ − λ max(0, −r(w))))",
        source="DPO-Positive: Pal et al. 2024 (Smaug), arXiv:2402.13228",
        use="Nearly equal completions, where DPO makes both less likely; λ is `dpop_lambda`.",
        defaults=BETA | {"dpop_lambda": 50.0},
        uses_margins=True,
    ),
)
