"""Losses of two numbers a pair, the log-ratio of each completion; one loss per pair out.

They say of chosen that it is good and of rejected that it is bad, not only which is better.
"""

import mlx.core as mx
import mlx.nn as nn


def nca_pair_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """Noise-contrastive alignment of a pair. (B,), (B,) -> (B,)

        loss = -log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l)

    Source: Chen et al. 2024, arXiv:2402.05369, for rewards of one and nothing.
    """
    good, bad = beta * chosen, beta * rejected
    return -nn.log_sigmoid(good) - 0.5 * nn.log_sigmoid(-good) - 0.5 * nn.log_sigmoid(-bad)


def bco_pair_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """Two classifications, chosen as good and rejected as bad. (B,), (B,) -> (B,)

        loss = -log sigmoid(beta r_w) - log sigmoid(-beta r_l)

    The paper takes a running mean of rewards from both; TRL does not, nor is it done here: the
    loss of a step would hang on all steps before.

    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    return -nn.log_sigmoid(beta * chosen) - nn.log_sigmoid(-beta * rejected)


def sppo_hard_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """Squared distances of the log-ratios from plus and minus 1 / (2 beta). (B,), (B,) -> (B,)

    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with eta = 1 / beta, where chosen wins
    against rejected with probability 1.
    """
    return mx.square(chosen - 0.5 / beta) + mx.square(rejected + 0.5 / beta)


def apo_zero_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l): chosen up, rejected down. (B,), (B,) -> (B,)

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    return mx.sigmoid(-beta * chosen) + mx.sigmoid(beta * rejected)


def apo_down_loss(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)): both down, rejected more.
    (B,), (B,) -> (B,)

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    return mx.sigmoid(beta * chosen) + mx.sigmoid(-beta * (chosen - rejected))


def kto_loss(
    ratios: mx.array,
    moved: mx.array,
    desirable: mx.array,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> mx.array:
    """Prospect-theoretic loss of judged completions. (B,), (B,), (B,) -> (B,)

        loss = lambda_D (1 - sigmoid(beta (r - z)))  of desirable ones
               lambda_U (1 - sigmoid(beta (z - r)))  of undesirable ones

    where z, the reference point, is how far the policy has moved: the mean log-ratio of
    completions that belong to other prompts, at least 0. No gradient flows through it.

    Args:
        ratios: r, log-ratios of the completions.
        moved: Log-ratios of mismatched completions, over all rows of a step.
        desirable: The judgements.
        beta: Strength of the pull back to the reference.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, Eqs. 7 and 8.
    """
    point = mx.maximum(mx.stop_gradient(moved).mean(), 0)
    ahead = mx.where(desirable, ratios - point, point - ratios)
    weights = mx.where(desirable, desirable_weight, undesirable_weight)
    return weights * mx.sigmoid(-beta * ahead)
