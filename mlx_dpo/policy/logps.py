"""Sequence log-probabilities of whole rows; here tokens and logits are shifted.

`policy.prefix` scores the same without whole rows, and is held against this one.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_dpo.policy.numerics import log_sum_exp
from mlx_dpo.types import PairBatch, PairLogps

CausalLM = Callable[[mx.array], mx.array]  # (N, T) token ids -> (N, T, V) logits


def token_logps(model: CausalLM, tokens: mx.array) -> mx.array:
    """log p(token | all before it) of every token but the first. (N, T) -> (N, T - 1) float32

    Logits are reduced in float32 whatever the model computes in.
    """
    logits = model(tokens[:, :-1]).astype(mx.float32)
    picked = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1).squeeze(-1)
    return picked - log_sum_exp(logits)


def token_alignments(model: CausalLM, tokens: mx.array) -> mx.array:
    """Of every token but the first, how likely it is beside one that the model would draw:
    log p(token) - log of the sum of p(v)^2 over the vocabulary. (N, T) -> (N, T - 1) float32

    Source: WPO, Zhou et al. 2024, arXiv:2406.11827, Eq. 2.
    """
    return alignments(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])


def alignments(logits: mx.array, targets: mx.array) -> mx.array:
    """`token_alignments` of logits. (..., V) float32, (...) -> (...)"""
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return picked + log_sum_exp(logits) - log_sum_exp(2 * logits)


def completion_logps(
    model: CausalLM, batch: PairBatch, *, ld_alpha: float | None = None
) -> mx.array:
    """Sum of log p(token | all before it) over the scored tokens of each row. (N,) float32

    Rows are padded on the right, so that a causal model cannot see the padding: exact
    for every architecture. Tokens beyond the length of the shorter completion of a pair count
    `ld_alpha` times: LD-DPO, Liu et al. 2024, arXiv:2409.06411, Eqs. 9 and 10.
    """
    # The mask travels with the token that is predicted, so it drops column 0 as well.
    scored = batch.completion_mask[:, 1:]
    logps = token_logps(model, batch.tokens)
    if ld_alpha is not None:
        logps = mx.where(_within_both(scored), logps, ld_alpha * logps)
    # `where`, not a product: an infinite log-probability under the mask must not become NaN.
    return mx.where(scored, logps, 0.0).sum(axis=-1)


def _within_both(scored: mx.array) -> mx.array:
    """Whether a token lies within the length of the shorter completion of its pair. (N, T)"""
    chosen, rejected = mx.split(scored.sum(axis=-1), 2)
    shorter = mx.minimum(chosen, rejected)
    return scored.cumsum(axis=-1) <= mx.concatenate([shorter, shorter])[:, None]


def pair_logps(model: CausalLM, batch: PairBatch, *, ld_alpha: float | None = None) -> PairLogps:
    """Chosen and rejected log-probabilities from one forward pass. (B,) each"""
    chosen, rejected = mx.split(completion_logps(model, batch, ld_alpha=ld_alpha), 2)
    return PairLogps(chosen, rejected)


def pair_alignments(model: CausalLM, batch: PairBatch) -> PairLogps:
    """Means of `token_alignments` over each completion. (B,) each"""
    scored = batch.completion_mask[:, 1:]
    sums = mx.where(scored, token_alignments(model, batch.tokens), 0.0).sum(axis=-1)
    chosen, rejected = mx.split(sums / scored.sum(axis=-1), 2)
    return PairLogps(chosen, rejected)
