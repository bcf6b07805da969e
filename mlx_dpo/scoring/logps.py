"""Sequence log-probabilities of whole rows; here tokens and logits are shifted.

`policy.prefix` scores the same without whole rows, and is held against this one.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlx_dpo.models.device import on_cpu
from mlx_dpo.scoring.kernels.attention import exp
from mlx_dpo.types import PairBatch, PairLogps


def logsumexp(logits: mx.array) -> mx.array:
    """log of the sum of exponentials over the last axis, for float32 logits. (..., V) -> (...)

    MLX's CPU backend adds one term after another, so that small ones vanish beside the
    sum: 7e-4 nats a token at V = 152k. Adding in pieces of about sqrt(V) leaves 2e-6.
    A GPU adds in parallel and has no such error.
    """
    return blockwise_logsumexp(logits) if on_cpu() else mx.logsumexp(logits, axis=-1)


def blockwise_logsumexp(logits: mx.array) -> mx.array:
    """`log_sum_exp` by a sum of sums, with its own gradient. (..., V) -> (...)"""
    fixed = mx.stop_gradient(logits)
    top = fixed.max(axis=-1, keepdims=True)
    terms = exp(fixed - top)
    total = _blockwise_sum(terms)
    return cast(mx.array, _log_of_sum(logits, top, terms, total))


@mx.custom_function
def _log_of_sum(logits: mx.array, top: mx.array, terms: mx.array, total: mx.array) -> mx.array:
    return top.squeeze(-1) + mx.log(total)


@_log_of_sum.vjp
def _log_of_sum_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    """Towards the logits: their share of the sum."""
    _, *fixed = primals
    _, terms, total = fixed
    return terms * (cotangent / total)[..., None], *[mx.zeros_like(value) for value in fixed]


def _blockwise_sum(terms: mx.array) -> mx.array:
    """Over the last axis. (..., V) -> (...)"""
    vocab = terms.shape[-1]
    width = math.isqrt(vocab)
    whole = vocab // width * width
    sums = terms[..., :whole].reshape(*terms.shape[:-1], -1, width).sum(axis=-1)
    return sums.sum(axis=-1) + terms[..., whole:].sum(axis=-1)


CausalLM = Callable[[mx.array], mx.array]  # (N, T) token ids -> (N, T, V) logits


def token_logps(model: CausalLM, tokens: mx.array) -> mx.array:
    """log p(token | all before it) of every token but the first. (N, T) -> (N, T - 1) float32

    Logits are reduced in float32 whatever the model computes in.
    """
    logits = model(tokens[:, :-1]).astype(mx.float32)
    picked = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1).squeeze(-1)
    return picked - logsumexp(logits)


def token_log_weights(model: CausalLM, tokens: mx.array) -> mx.array:
    """Of every token but the first, how likely it is beside one that the model would draw:
    log p(token) - log of the sum of p(v)^2 over the vocabulary. (N, T) -> (N, T - 1) float32

    Source: WPO, Zhou et al. 2024, arXiv:2406.11827, Eq. 2.
    """
    return log_weights(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])


def log_weights(logits: mx.array, targets: mx.array) -> mx.array:
    """`token_alignments` of logits. (..., V) float32, (...) -> (...)"""
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return picked + logsumexp(logits) - logsumexp(2 * logits)


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
        logps = mx.where(_within_shorter_completion(scored), logps, ld_alpha * logps)
    # `where`, not a product: an infinite log-probability under the mask must not become NaN.
    return mx.where(scored, logps, 0.0).sum(axis=-1)


def _within_shorter_completion(scored: mx.array) -> mx.array:
    """Whether a token lies within the length of the shorter completion of its pair. (N, T)"""
    chosen, rejected = mx.split(scored.sum(axis=-1), 2)
    shorter = mx.minimum(chosen, rejected)
    return scored.cumsum(axis=-1) <= mx.concatenate([shorter, shorter])[:, None]


def pair_logps(model: CausalLM, batch: PairBatch, *, ld_alpha: float | None = None) -> PairLogps:
    """Chosen and rejected log-probabilities from one forward pass. (B,) each"""
    chosen, rejected = mx.split(completion_logps(model, batch, ld_alpha=ld_alpha), 2)
    return PairLogps(chosen, rejected)


def pair_log_weights(model: CausalLM, batch: PairBatch) -> PairLogps:
    """Means of `token_alignments` over each completion. (B,) each"""
    scored = batch.completion_mask[:, 1:]
    sums = mx.where(scored, token_log_weights(model, batch.tokens), 0.0).sum(axis=-1)
    chosen, rejected = mx.split(sums / scored.sum(axis=-1), 2)
    return PairLogps(chosen, rejected)
