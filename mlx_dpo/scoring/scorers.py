"""Scorers: functions from a model and pairs to the log-probs of their completions.

A scorer returns summed log-probs, and can be differentiated with respect to the model's trainable
parameters inside `nn.value_and_grad`. The plain scorer runs whole padded sequences; the shared
scorer runs the prompt of each pair once; the trie scorer runs each distinct prefix of all texts
once. `select_scorer` decides between them. The context managers below select the kernels that a
model runs with.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.master_weights import cast_for_forward
from mlx_dpo.data.batches.collate import collate
from mlx_dpo.data.batches.token_counts import (
    CountTokens,
    packed_row_tokens,
    shared_prompt_tokens,
    trie_tokens,
)
from mlx_dpo.models.device import is_cpu
from mlx_dpo.scoring.backbone import ModelParts, split_backbone
from mlx_dpo.scoring.kernels.attention_dispatch import use_chunked_attention
from mlx_dpo.scoring.kernels.gradient_checkpointing import gradient_checkpointing
from mlx_dpo.scoring.kernels.rope import use_token_positions
from mlx_dpo.scoring.kernels.swiglu import use_fast_swiglu
from mlx_dpo.scoring.kernels.take_rows import take_rows
from mlx_dpo.scoring.lm_head import chunked_log_weights, chunked_logps
from mlx_dpo.scoring.logps import pair_log_weights, pair_logps, supervised_logps
from mlx_dpo.scoring.packing.packed_sequence import PackedSequence, packed_hidden_states
from mlx_dpo.scoring.packing.shared_prompts import SharedPromptSequence
from mlx_dpo.scoring.packing.trie import TrieSequence
from mlx_dpo.scoring.sharded.gathered_blocks import is_sharded
from mlx_dpo.scoring.shared_prefix import completion_hidden_states
from mlx_dpo.types import PairLogps, TokenizedPair, lack_rejected, scored_completions

Scorer = Callable[[nn.Module, Sequence[TokenizedPair]], PairLogps]  # (B,) float32 each

# Batching strategy of pairs whose prompts run once: the prefix trie of all texts packed into one
# sequence; all pairs packed into one sequence; one batch with padded prompts; or one batch per
# prompt length.
Packing = Literal["trie", "row", "batch", "lengths"]
PACKED_LAYOUTS: dict[Packing, Callable[[Sequence[TokenizedPair]], PackedSequence]] = {
    "trie": TrieSequence,
    "row": SharedPromptSequence,
}

# Number of tokens that a pass puts through the layers.
TOKEN_COUNTS: dict[Packing, CountTokens] = {
    "trie": trie_tokens,
    "row": packed_row_tokens,
    "batch": partial(shared_prompt_tokens, together=True),
    "lengths": partial(shared_prompt_tokens, together=False),
}


@contextmanager
def memory_efficient_training(policy: nn.Module, *, recompute: bool) -> Iterator[None]:
    """Save memory in passes with gradients inside the block.

    Attention is computed in chunks and, if `recompute` is set, the layers are checkpointed. On the
    CPU, SwiGLU is replaced by a faster version. Evaluate the gradients inside the block too,
    because the evaluation may run layers again.
    """
    # The blocks of a sharded model run again anyway.
    recompute = recompute and not is_sharded(policy)
    checkpointing = gradient_checkpointing(policy) if recompute else nullcontext()
    with use_chunked_attention(), use_token_positions(), use_fast_swiglu(policy), checkpointing:
        yield


@contextmanager
def fast_inference(model: nn.Module) -> Iterator[None]:
    """Run passes without gradients with the fastest kernels of the device inside the block.

    These are chunked attention and a faster SwiGLU on the CPU, and MLX's fused kernels on a GPU.
    """
    attention = use_chunked_attention() if is_cpu() else nullcontext()
    with attention, use_fast_swiglu(model):
        yield


def plain_scorer(
    model: nn.Module, pairs: Sequence[TokenizedPair], *, ld_alpha: float | None = None
) -> PairLogps:
    """Return the summed log-probs of the completions, from whole right-padded sequences. (B,) each

    The values are exact for every causal model.

    Args:
        ld_alpha: weight of the tokens beyond the length of the pair's shorter completion (LD-DPO).
    """
    with cast_for_forward(model):
        if lack_rejected(pairs):
            return supervised_logps(model, collate(pairs))
        return pair_logps(model, collate(pairs), ld_alpha=ld_alpha)


def plain_log_weights(model: nn.Module, pairs: Sequence[TokenizedPair]) -> PairLogps:
    """Return the mean WPO log-weight per token of each completion. (B,) each

    The log-weights are computed from whole right-padded sequences.
    """
    with cast_for_forward(model):
        return pair_log_weights(model, collate(pairs))


def make_shared_scorer(
    *, vocab_size: int, gradients: bool, packing: Packing, ld_alpha: float | None = None
) -> Scorer:
    """Return a scorer that runs each prompt, or each distinct prefix, only once.

    The LM head runs on completion tokens only. The scorer is exact only for models for which
    `select_scorer` has verified it.

    Args:
        gradients: whether the log-probs will be differentiated.
        ld_alpha: weight of the tokens beyond the length of the pair's shorter completion (LD-DPO).
    """
    return partial(
        _score_with_shared_prompts,
        packing=packing,
        token_values=partial(chunked_logps, vocab_size=vocab_size, gradients=gradients),
        reduce=partial(_sum_logps, ld_alpha=ld_alpha),
    )


def make_shared_log_weights(*, vocab_size: int, packing: Packing) -> Scorer:
    """Return a function that computes `plain_log_weights` as the shared scorer does log-probs."""
    return partial(
        _score_with_shared_prompts,
        packing=packing,
        token_values=partial(chunked_log_weights, vocab_size=vocab_size),
        reduce=lambda values, shorter: values.mean(),
    )


def _score_with_shared_prompts(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    packing: Packing,
    token_values: Callable[..., mx.array],
    reduce: Callable[[mx.array, int], mx.array],
) -> PairLogps:
    """Compute one number per completion (such as its log-prob), running each prompt once. (B,) each

    Of pairs without rejected completions, the second number is that of hits, see `PairLogps`.

    Args:
        packing: batching strategy for the pairs.
        token_values: function that computes a number per target token, (n,), from the model parts,
            the hidden states and the target tokens.
        reduce: function that computes the number of a completion, a scalar, from its token values
            and the length of the pair's shorter completion.
    """
    batches = _batches(pairs, by_length=packing == "lengths")
    is_single = lack_rejected(pairs)
    if is_single:
        token_values = partial(token_values, with_hits=True)
    completions = [
        (completion, min(len(pairs[i].chosen), len(pairs[i].rejected)))
        for batch in batches
        for i, completion in zip(
            batch * (2 - is_single), scored_completions([pairs[i] for i in batch]), strict=True
        )
    ]
    with cast_for_forward(model):
        parts = split_backbone(model)
        if layout := PACKED_LAYOUTS.get(packing):
            values = _packed_values(model, parts, layout(pairs), token_values)  # (n,)
        else:
            targets = mx.array([token for completion, _ in completions for token in completion])
            hidden = [
                completion_hidden_states(model, parts, [pairs[i] for i in batch])
                for batch in batches
            ]
            values = token_values(parts, mx.concatenate(hidden), targets)
    ends = list(itertools.accumulate(len(completion) for completion, _ in completions))
    by_completion = zip(mx.split(values, ends[:-1]), completions, strict=True)
    scores = [reduce(part, shorter) for part, (_, shorter) in by_completion]
    if is_single:  # log-prob and hits of each completion
        scores = [score[i] for batch in _split(scores, batches) for i in (0, 1) for score in batch]
    return _in_pair_order(scores, batches)


def _split(
    scores: Sequence[mx.array], batches: Sequence[Sequence[int]]
) -> Iterator[list[mx.array]]:
    """Yield the scores of each batch, of which there is one per pair."""
    remaining = iter(scores)
    for batch in batches:
        yield list(itertools.islice(remaining, len(batch)))


def _packed_values(
    model: nn.Module,
    parts: ModelParts,
    sequence: PackedSequence,
    token_values: Callable[..., mx.array],
) -> mx.array:
    """Return a number per predicted token of a packed sequence, computed by `token_values`. (n,)"""
    head = sequence.head_rows()
    hidden = take_rows(packed_hidden_states(model, parts, sequence), head.indices)  # (m, D)
    values = token_values(parts, hidden, head.targets)  # (m,)
    return values if head.rows is None else take_rows(values, head.rows)


def _sum_logps(logps: mx.array, shorter: int, *, ld_alpha: float | None) -> mx.array:
    """Return the sum of a completion's token log-probs. (n,) -> (), or (n, 2) -> (2,) with hits

    Args:
        shorter: number of tokens of the pair's shorter completion.
        ld_alpha: weight of the tokens beyond that number; None weights all tokens equally.
    """
    if ld_alpha is None:
        return logps.sum(axis=0)
    return logps[:shorter].sum() + ld_alpha * logps[shorter:].sum()


def _batches(pairs: Sequence[TokenizedPair], *, by_length: bool) -> list[list[int]]:
    """Divide the pairs into batches; return each batch as a list of indices into `pairs`.

    With `by_length`, a batch contains the pairs whose prompts have the same number of tokens.
    Otherwise a single batch contains all pairs.
    """
    batches: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs):
        batches.setdefault(len(pair.prompt) if by_length else 0, []).append(index)
    return list(batches.values())


def _in_pair_order(scores: Sequence[mx.array], batches: Sequence[Sequence[int]]) -> PairLogps:
    """Return the numbers of the completions, sorted into the order of the pairs. (B,) each

    Args:
        scores: one number per completion; for each batch first those of the chosen, then those of
            the rejected completions.
        batches: indices of the pairs of each batch.
    """
    chosen: dict[int, mx.array] = {}
    rejected: dict[int, mx.array] = {}
    remaining = iter(scores)
    for batch in batches:
        chosen.update(zip(batch, itertools.islice(remaining, len(batch)), strict=True))
        rejected.update(zip(batch, itertools.islice(remaining, len(batch)), strict=True))
    order = range(len(chosen))
    return PairLogps(mx.stack([chosen[i] for i in order]), mx.stack([rejected[i] for i in order]))
