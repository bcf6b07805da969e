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


def completion_logps(model: CausalLM, batch: PairBatch) -> mx.array:
    """Sum of log p(token | all before it) over the scored tokens of each row. (N,) float32

    Rows are padded on the right, so that a causal model cannot see the padding: exact
    for every architecture.
    """
    # The mask travels with the token that is predicted, so it drops column 0 as well.
    scored = batch.completion_mask[:, 1:]
    # `where`, not a product: an infinite log-probability under the mask must not become NaN.
    return mx.where(scored, token_logps(model, batch.tokens), 0.0).sum(axis=-1)


def pair_logps(model: CausalLM, batch: PairBatch) -> PairLogps:
    """Chosen and rejected log-probabilities from one forward pass. (B,) each"""
    chosen, rejected = mx.split(completion_logps(model, batch), 2)
    return PairLogps(chosen, rejected)
