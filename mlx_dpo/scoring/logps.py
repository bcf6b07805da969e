"""Reference implementation: compute log-probs of completions from whole padded sequences.

The logits at one position predict the token at the next position. `shared_prefix` and `packing`
compute the same values faster, and are compared with this module.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_dpo.scoring.kernels.softmax import logsumexp, target_logps
from mlx_dpo.types import PairBatch, PairLogps

CausalLM = Callable[[mx.array], mx.array]  # (N, T) token ids -> (N, T, V) logits


def token_logps(model: CausalLM, tokens: mx.array) -> mx.array:
    """Return log p(token | preceding tokens) of each token but the first. (N, T) -> (N, T-1)

    The log-softmax is computed in float32 whatever the dtype of the logits.
    """
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return target_logps(logits, tokens[:, 1:])


def token_log_weights(model: CausalLM, tokens: mx.array) -> mx.array:
    """Return WPO's log-weight of each token but the first. (N, T) -> (N, T-1) float32"""
    return log_weights(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])


def log_weights(logits: mx.array, targets: mx.array) -> mx.array:
    """Return WPO's log-weight of each target token. (..., V) float32, (...) -> (...)

    The log-weight is log p(target) - log sum_v p(v)^2. It compares the likelihood of the target
    with the mean likelihood of a token sampled from the model.

    Source: WPO, Zhou et al. 2024, arXiv:2406.11827, Eq. 2.
    """
    target_logits = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return target_logits + logsumexp(logits) - logsumexp(2 * logits)


def completion_logps(
    model: CausalLM, batch: PairBatch, *, ld_alpha: float | None = None
) -> mx.array:
    """Return the summed log-probs of the completion tokens of each sequence. (N,) float32

    Sequences are padded on the right, where a causal model cannot see the padding. The values are
    therefore exact for every architecture.

    Args:
        ld_alpha: weight of the tokens beyond the length of the pair's shorter completion. Source:
            LD-DPO, Liu et al. 2024, arXiv:2409.06411, Eqs. 9 and 10.
    """
    # The mask belongs to the predicted token, so it drops column 0 as well.
    scored = batch.completion_mask[:, 1:]
    logps = token_logps(model, batch.tokens)
    if ld_alpha is not None:
        logps = mx.where(_within_shorter_completion(scored), logps, ld_alpha * logps)
    # `where`, not a product: an infinite log-probability under the mask must not become NaN.
    return mx.where(scored, logps, 0.0).sum(axis=-1)


def _within_shorter_completion(scored: mx.array) -> mx.array:
    """Return a mask without completion tokens beyond the length of the pair's shorter completion.

    The mask has the shape (N, T) and is boolean.

    Args:
        scored: mask of the completion tokens, (N, T); first the rows of all chosen completions,
            then those of all rejected ones.
    """
    chosen, rejected = mx.split(scored.sum(axis=-1), 2)
    shorter = mx.minimum(chosen, rejected)
    return scored.cumsum(axis=-1) <= mx.concatenate([shorter, shorter])[:, None]


def pair_logps(model: CausalLM, batch: PairBatch, *, ld_alpha: float | None = None) -> PairLogps:
    """Return the summed log-probs of chosen and rejected completions. (B,) each

    A single forward pass computes chosen and rejected completions.
    """
    chosen, rejected = mx.split(completion_logps(model, batch, ld_alpha=ld_alpha), 2)
    return PairLogps(chosen, rejected)


def supervised_logps(model: CausalLM, batch: PairBatch) -> PairLogps:
    """Return the summed log-probs of the scored tokens, and their number of hits. (B,) each

    The pairs have no rejected completions. A hit is a scored token that the model ranks first.
    """
    logits, targets = model(batch.tokens[:, :-1]).astype(mx.float32), batch.tokens[:, 1:]
    scored = batch.completion_mask[:, 1:]
    values = mx.where(scored, target_logps(logits, targets), 0.0).sum(axis=-1)
    return PairLogps(values, mx.where(scored, hits(logits, targets), 0.0).sum(axis=-1))


def hits(logits: mx.array, targets: mx.array) -> mx.array:
    """Return 1 for each target token with the largest logit, else 0. (..., V), (...) -> (...)

    The result is float32 and has no gradient.
    """
    return mx.stop_gradient((mx.argmax(logits, axis=-1) == targets).astype(mx.float32))


def pair_log_weights(model: CausalLM, batch: PairBatch) -> PairLogps:
    """Return the mean WPO log-weight per token of each chosen and rejected completion. (B,) each"""
    scored = batch.completion_mask[:, 1:]
    sums = mx.where(scored, token_log_weights(model, batch.tokens), 0.0).sum(axis=-1)
    chosen, rejected = mx.split(sums / scored.sum(axis=-1), 2)
    return PairLogps(chosen, rejected)
