"""Losses of ranked data: of lists of completions in the order of their scores, or of score gaps.

A list of K completions is given by its pairs: every two completions with different scores, as
`ranked: all` makes them. Completions with equal scores make no pair. The loss of a list is divided
among its pairs: a step minimizes the sum of its lists' losses divided by its number of pairs. For
lists of two completions this is the mean over lists; for lists of K it is that mean divided by
K (K - 1) / 2, so that the gradient has the size of a pairwise loss's.

Arrays are given by pair: `margins` are f-divergence scores (for reverse KL: log-ratios) of chosen
minus rejected in nats, (B,); `lists` is the index of the pair's list, (B,); `places` are the
positions of chosen and rejected in their list, from 0, (B, 2).
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.io.arrays import scalar
from mlx_dpo.losses.loss import BETA, Loss
from mlx_dpo.types import PairLogps

# Log-ratios (in nats) are compared as multiples of this: rounding would order those that are equal,
# as at the first step, and differently for each size of micro-batches.
TIE = 1e-3
# Largest absolute score for `lipo_lambda`: its gains are powers of two.
LARGEST_SCORE = 20.0


def plackett_luce_loss(
    margins: mx.array, lists: mx.array, places: mx.array, *, beta: float
) -> mx.array:
    """Return the Plackett-Luce loss of DPO for rankings, divided among the pairs. (B,)

        loss of a list = sum over completions i of log(1 + sum over worse j of exp(-beta m_ij))

    where m_ij is the margin of i and j. A term is the negative log-probability that i is drawn
    before all worse completions, in proportion to exp(reward); for distinct scores the sum is that
    of the whole ranking. A list of two completions has `sigmoid_loss`. Each term is divided evenly
    among the pairs in which i is chosen.

    Ties: the paper has none. Completions of equal score are drawn in no order: none of them is in
    the term of another.

    Args:
        margins: m, margins in nats. (B,)
        lists: Index of each pair's list. (B,)
        places: Positions of chosen and rejected in their list. (B, 2)
        beta: Strength of the KL constraint.

    Source: Rafailov et al. 2023, arXiv:2305.18290, App. A.3.
    """
    size = _max(places) + 1
    count = (_max(lists) + 1) * size  # of chosen completions i; a row of `size` for each
    # Distinct indices, so that every run adds the terms of a row in the same order, on a GPU too.
    at = (lists * size + places[:, 0]) * size + places[:, 1]
    exponents = -beta * margins

    def spread(values: mx.array) -> mx.array:
        return mx.zeros((count * size,)).at[at].add(values).reshape(count, size)

    def by_pair(rows: mx.array) -> mx.array:
        return mx.broadcast_to(rows, (count, size)).reshape(-1)[at]

    largest = spread(mx.stop_gradient(mx.maximum(exponents, 0)))
    shift = largest.max(axis=1, keepdims=True)
    sums = spread(mx.exp(exponents - by_pair(shift))).sum(axis=1, keepdims=True)
    pairs = spread(mx.ones_like(margins)).sum(axis=1, keepdims=True)
    return by_pair(shift + mx.log(mx.exp(-shift) + sums)) / by_pair(pairs)


def lipo_lambda_loss(
    margins: mx.array,
    ratios: PairLogps,
    lists: mx.array,
    places: mx.array,
    scores: mx.array,
    *,
    beta: float,
) -> mx.array:
    """Return the LiPO-lambda loss: logistic losses of all pairs, weighted by gain and rank. (B,)

        loss of a pair = |G_w - G_l| |1/D(rank_w) - 1/D(rank_l)| log(1 + exp(-beta m))
        G = 2^score - 1,  D(rank) = log(1 + rank)

    where w is chosen, l rejected, and the rank, from 1, is that among the list's completions in
    the order of the policy's log-ratios. No gradient flows through ranks and weights.

    Ties: log-ratios that are equal when rounded to multiples of `TIE` are ordered by score, the
    better one first, so that the ranks are those of the data before the first step. If the scores
    are equal, too, the completions share the mean of their ranks.

    Args:
        margins: m, margins in nats. (B,)
        ratios: Log-ratios of chosen and rejected in nats. (B,) each
        lists: Index of each pair's list. (B,)
        places: Positions of chosen and rejected in their list. (B, 2)
        scores: Scores of chosen and rejected in the data; higher is better. (B, 2)
        beta: Strength of the KL constraint.

    Source: Liu et al. 2024, arXiv:2402.01878.
    """
    discounts = 1 / mx.log1p(_ranks(mx.stack([*ratios], axis=1), lists, places, scores))
    gains = mx.power(2.0, scores)
    weights = mx.abs(gains[:, 0] - gains[:, 1]) * mx.abs(discounts[:, 0] - discounts[:, 1])
    return -weights * nn.log_sigmoid(beta * margins)


def _ranks(ratios: mx.array, lists: mx.array, places: mx.array, scores: mx.array) -> mx.array:
    """Return the ranks of chosen and rejected by their log-ratios, from 1. (B, 2) all"""
    num_lists, size = _max(lists) + 1, _max(places) + 1
    at = lists[:, None] * size + places

    def spread(values: mx.array) -> mx.array:
        """Return the values by list and position; -inf where a list has no completion."""
        empty = mx.full((num_lists * size,), -mx.inf)
        return empty.at[at].maximum(mx.stop_gradient(values)).reshape(num_lists, 1, size)

    ratio, score = spread(mx.round(ratios / TIE)), spread(scores)
    own_ratio, own_score = ratio.swapaxes(1, 2), score.swapaxes(1, 2)  # (L, K, 1), others: last
    is_tied = ratio == own_ratio
    before = mx.where(is_tied, score > own_score, ratio > own_ratio).astype(mx.float32)
    equals = (is_tied & (score == own_score)).sum(axis=2) - 1  # without the completion itself
    return (1 + before.sum(axis=2) + 0.5 * equals).reshape(-1)[at]


def _max(indices: mx.array) -> int:
    return int(scalar(indices.max()))


def rpo_loss(margins: mx.array, gaps: mx.array, *, beta: float, rpo_eta: float) -> mx.array:
    """Return the RPO loss: the margin should be in proportion to the gap of the scores. (B,)

        loss = p log(p / q) + (1 - p) log((1 - p) / (1 - q))
        p = sigmoid(eta gap),  q = sigmoid(beta m)

    This is the KL divergence of the policy's preference q from that of the scores, p: a small gap
    asks for a small margin, and a margin beyond eta gap / beta decreases again. It is not the
    RPO of TRL's `rpo_alpha`, which adds `sft_loss`.

    Args:
        margins: m, margins in nats. (B,)
        gaps: Score of chosen minus score of rejected, from the margin column. (B,)
        beta: Strength of the KL constraint.
        rpo_eta: eta, the log-odds of the preference for a gap of 1.

    Source: Nemotron-4 340B, Adler et al. 2024, arXiv:2406.11704, section 3.3.2; it is `rpo_bwd_kl`
    of NeMo, where eta is `gt_reward_scale`.
    """
    wanted, actual = rpo_eta * gaps, beta * margins
    p, other = mx.sigmoid(wanted), mx.sigmoid(-wanted)
    return p * (nn.log_sigmoid(wanted) - nn.log_sigmoid(actual)) + other * (
        nn.log_sigmoid(-wanted) - nn.log_sigmoid(-actual)
    )


LOSSES = (
    Loss(
        name="plackett_luce",
        function=lambda pairs, s: plackett_luce_loss(
            pairs.margin, pairs.metadata.lists, pairs.metadata.places, beta=s.beta
        ),
        equation="of a list: sum over i of log(1 + sum over worse j of exp(−βΔ_ij))",
        source="DPO for rankings: Rafailov et al. 2023, arXiv:2305.18290, App. A.3",
        use="Ranked lists whose whole order is meant; with two completions it is `sigmoid`.",
        defaults=BETA,
        uses_whole_batch=True,
        listwise=True,
        uses_divergence=True,
    ),
    Loss(
        name="lipo_lambda",
        function=lambda pairs, s: lipo_lambda_loss(
            pairs.margin,
            pairs.log_ratios,
            pairs.metadata.lists,
            pairs.metadata.places,
            pairs.metadata.scores,
            beta=s.beta,
        ),
        equation="−|2^ψ(w) − 2^ψ(l)| |1/log(1+τ(w)) − 1/log(1+τ(l))| log σ(βΔ), ψ: score, τ: rank "
        "by r in the list",
        source="LiPO-λ: Liu et al. 2024, arXiv:2402.01878",
        use="Ranked lists whose scores (0 to 1, or a few points) say how much better: errors at "
        "the top count most.",
        defaults=BETA,
        uses_whole_batch=True,
        listwise=True,
        uses_divergence=True,
    ),
    Loss(
        name="rpo_bwd_kl",
        function=lambda pairs, s: rpo_loss(
            pairs.margin, pairs.offset, beta=s.beta, rpo_eta=s.rpo_eta
        ),
        equation="p log(p/q) + (1−p) log((1−p)/(1−q)), p = σ(η (ψ(w) − ψ(l))), q = σ(βΔ), ψ: score",
        source="RPO: Nemotron-4 340B, Adler et al. 2024, arXiv:2406.11704, section 3.3.2",
        use="Scores say how much better: margins should be in proportion, and not grow forever; "
        "needs `margin_column`; η is `rpo_eta`.",
        defaults=BETA | {"rpo_eta": 1.0},
        uses_margins=True,
        uses_divergence=True,
    ),
)
