"""Losses that are functions of each completion's log-ratio, and not only of the pair's margin.

These losses control how likely chosen and rejected become in absolute terms. `chosen` and
`rejected` are log-ratios in nats, (B,); each function returns one loss per pair.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.losses.loss import BETA, Loss


def nca_pair_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """Return the NCA (noise-contrastive alignment) loss. (B,), (B,) -> (B,)

        loss = -log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l)

    where r_w and r_l are the log-ratios of chosen and rejected.

    Source: Chen et al. 2024, arXiv:2402.05369, for rewards of 1 and 0.
    """
    high, low = beta * chosen, beta * rejected
    return -nn.log_sigmoid(high) - 0.5 * nn.log_sigmoid(-high) - 0.5 * nn.log_sigmoid(-low)


def bco_pair_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """Return the BCO loss of chosen and rejected log-ratios. (B,), (B,) -> (B,)

        loss = -log sigmoid(beta chosen) - log sigmoid(-beta rejected)

    This is binary classification with the label 1 for chosen and 0 for rejected. The paper
    subtracts a running mean of rewards (reward shift). TRL does not, and neither does this
    function, because the loss of a step would then depend on all steps before.

    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    return -nn.log_sigmoid(beta * chosen) - nn.log_sigmoid(-beta * rejected)


def sppo_hard_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """Return the SPPO loss: squared distances of log-ratios from ±1 / (2 beta). (B,), (B,) -> (B,)

    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with eta = 1 / beta, where chosen wins
    against rejected with probability 1.
    """
    return mx.square(chosen - 0.5 / beta) + mx.square(rejected + 0.5 / beta)


def apo_zero_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """Return the APO-zero loss, which raises chosen and lowers rejected. (B,), (B,) -> (B,)

        loss = 1 - sigmoid(beta r_w) + sigmoid(beta r_l)

    where r_w and r_l are the log-ratios of chosen and rejected.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    return mx.sigmoid(-beta * chosen) + mx.sigmoid(beta * rejected)


def apo_down_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """Return the APO-down loss, which lowers chosen, and rejected even more. (B,), (B,) -> (B,)

        loss = sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l))

    where r_w and r_l are the log-ratios of chosen and rejected.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    return mx.sigmoid(beta * chosen) + mx.sigmoid(-beta * (chosen - rejected))


def kto_loss(
    ratios: mx.array,
    mismatched: mx.array,
    desirable: mx.array,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> mx.array:
    """Return the KTO loss of labelled completions. (B,), (B,), (B,) -> (B,)

        loss = lambda_D (1 - sigmoid(beta (r - z)))  if desirable
               lambda_U (1 - sigmoid(beta (z - r)))  if undesirable

    where the reference point z estimates the KL divergence of policy and reference: the mean
    log-ratio of completions of other prompts, at least 0. No gradient flows through z.

    Args:
        ratios: r, log-ratios of the completions.
        mismatched: Log-ratios of completions of other prompts, over all rows of a step.
        desirable: True for each completion that is labelled as good.
        beta: Strength of the KL constraint.
        desirable_weight: lambda_D, the weight of desirable completions.
        undesirable_weight: lambda_U, the weight of undesirable completions.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, Eqs. 7 and 8.
    """
    point = mx.maximum(mx.stop_gradient(mismatched).mean(), 0)
    gain = mx.where(desirable, ratios - point, point - ratios)
    weights = mx.where(desirable, desirable_weight, undesirable_weight)
    return weights * mx.sigmoid(-beta * gain)


LOSSES = (
    Loss(
        name="nca_pair",
        function=lambda pairs, s: nca_pair_loss(
            pairs.log_ratios.chosen, pairs.log_ratios.rejected, beta=s.beta
        ),
        equation="−log σ(βr(w)) − ½ log σ(−βr(w)) − ½ log σ(−βr(l))",
        source="NCA: Chen et al. 2024, arXiv:2402.05369",
        use="The likelihood of chosen must not decrease.",
        defaults=BETA,
    ),
    Loss(
        name="bco_pair",
        function=lambda pairs, s: bco_pair_loss(
            pairs.log_ratios.chosen, pairs.log_ratios.rejected, beta=s.beta
        ),
        equation="−log σ(βr(w)) − log σ(−βr(l))",
        source="BCO: Jung et al. 2024, arXiv:2404.04656, without its reward shift",
        use="Part of MPO; chosen and rejected are good and bad in absolute terms.",
        defaults=BETA,
    ),
    Loss(
        name="sppo_hard",
        function=lambda pairs, s: sppo_hard_loss(
            pairs.log_ratios.chosen, pairs.log_ratios.rejected, beta=s.beta
        ),
        equation="(r(w) − 1/(2β))² + (r(l) + 1/(2β))²",
        source="SPPO: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with win rates of 1 and 0",
        use="A round of self-play on pairs sampled from the policy.",
        defaults={"beta": 0.001},
    ),
    Loss(
        name="apo_zero",
        function=lambda pairs, s: apo_zero_loss(
            pairs.log_ratios.chosen, pairs.log_ratios.rejected, beta=s.beta
        ),
        equation="1 − σ(βr(w)) + σ(βr(l))",
        source="APO-zero: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7",
        use="Chosen completions are better than the model's own.",
        defaults=BETA,
    ),
    Loss(
        name="apo_down",
        function=lambda pairs, s: apo_down_loss(
            pairs.log_ratios.chosen, pairs.log_ratios.rejected, beta=s.beta
        ),
        equation="σ(βr(w)) + 1 − σ(βΔ)",
        source="APO-down: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8",
        use="Chosen completions are worse than the model's own.",
        defaults=BETA,
    ),
    Loss(
        name="kto",
        function=lambda pairs, s: kto_loss(
            pairs.log_ratios.chosen,
            pairs.log_ratios.rejected,
            pairs.metadata.desirable,
            beta=s.beta,
            desirable_weight=s.desirable_weight,
            undesirable_weight=s.undesirable_weight,
        ),
        equation="λ (1 − σ(β(r − z))) if desirable, λ (1 − σ(β(z − r))) if not, z: max(0, mean r "
        "of mismatched completions)",
        source="KTO: Ethayarajh et al. 2024, arXiv:2402.01306, Eqs. 7 and 8",
        use="Thumbs up or down on single answers.",
        defaults=BETA | {"desirable_weight": 1.0, "undesirable_weight": 1.0},
        uses_whole_batch=True,
        labelled=True,
    ),
)
