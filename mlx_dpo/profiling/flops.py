"""FLOPs of forward and training passes, computed from the shapes of a model.

A multiplication and an addition count as two operations. Only matrix products are counted. Norms,
activations, softmax and recurrences take time but have few operations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_dpo.adapters.layers import ADAPTER_TYPES
from mlx_dpo.adapters.master_weights import has_master_weights
from mlx_dpo.data.batches.padding import padded_width
from mlx_dpo.data.batches.prefix_trie import PrefixTrie, pair_texts
from mlx_dpo.profiling.layer_subset import first_trained_layer
from mlx_dpo.types import TokenizedPair

# Names under which architectures configure the number of experts per token.
EXPERTS_PER_TOKEN_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens and attended keys that determine the FLOPs of one or several passes."""

    layer_tokens: int  # tokens through the layers, padding included
    head_tokens: int  # tokens through the head
    attended_keys: int  # keys that a query attends to, summed over the queries of one layer


def count_trie_tokens(passes: Iterable[Sequence[TokenizedPair]]) -> TokenCounts:
    """Count the tokens and attended keys of passes that run each distinct prefix once."""
    tokens = rows = keys = 0
    for pairs in passes:
        trie = PrefixTrie(pair_texts(pairs))
        tokens += padded_width(len(trie))
        keys += int(trie.positions.sum()) + len(trie)
        scored = [(pair.chosen, pair.scored) for pair in pairs]
        scored += [(pair.rejected, list(range(len(pair.rejected)))) for pair in pairs]
        rows += len(
            {
                (int(path[len(path) - len(completion) + i]), completion[i])
                for path, (completion, places) in zip(trie.paths, scored, strict=True)
                for i in places
            }
        )
    return TokenCounts(tokens, rows, keys)


@dataclass(frozen=True)
class ModelFlops:
    """Numbers of weights of a model, from which the FLOPs of its passes follow.

    With t tokens through the layers, h tokens through the LM head and s attended keys, a pass
    takes

        forward        2 (W + A) t + 4 K s + 2 H h
        backward       2 W' t + 4 A t + 2 F t + 10 K' s + 2 H h
        recomputation  2 (W' + A) t + 4 K' s           with gradient checkpointing

    W is the number of weights of linear layers that each token is multiplied with, A that of the
    adapters, F the trained part of W (full fine-tuning), and H that of the LM head. K is the
    number of attention heads times their width, summed over all layers with attention. W' and K'
    count only the layers from the first trained layer on, because gradients flow no further down.
    In the backward pass frozen weights get no gradient. Attention takes five products there: its
    scores again, and the gradients of probabilities, values, queries and keys.
    """

    linear: int  # W
    linear_backward: int  # W'
    adapters: int  # A
    attention: int  # K
    attention_backward: int  # K'
    head: int  # H
    trained_linear: int = 0  # F

    def forward(self, tokens: TokenCounts, *, adapted: bool = True) -> int:
        """Return the FLOPs of no-gradient forward passes, with adapters if `adapted` is set."""
        weights = self.linear + (self.adapters if adapted else 0)
        products = weights * tokens.layer_tokens + self.head * tokens.head_tokens
        return 2 * products + 4 * self.attention * tokens.attended_keys

    def training(self, tokens: TokenCounts, *, recompute: bool) -> int:
        """Return the FLOPs of forward and backward passes.

        `recompute` adds the FLOPs of gradient checkpointing.
        """
        backward_weights = self.linear_backward + 2 * self.adapters + self.trained_linear
        backward = 2 * backward_weights * tokens.layer_tokens
        backward += 10 * self.attention_backward * tokens.attended_keys
        backward += 2 * self.head * tokens.head_tokens
        recomputation = 2 * (self.linear_backward + self.adapters) * tokens.layer_tokens
        recomputation += 4 * self.attention_backward * tokens.attended_keys
        return self.forward(tokens) + backward + (recomputation if recompute else 0)


def model_flops(model: nn.Module, config: Mapping[str, Any], *, vocab_size: int) -> ModelFlops:
    """Count the weights of a model that determine its FLOPs.

    The numbers of attention heads and of experts per token are read from `config`, the content of
    the model's `config.json`.
    """
    entries = {**config, **(config.get("text_config") or {})}
    keys = (key for key in EXPERTS_PER_TOKEN_KEYS if entries.get(key))
    experts = next((int(entries[key]) for key in keys), None)
    layers = list(model.layers)
    linear = [sum(_linear_weights(part, experts) for part in layer.modules()) for layer in layers]
    attention = _attention_widths(model, entries)
    first = first_trained_layer(model)
    parts = [part for layer in layers for part in layer.modules()]
    trained = [part for part in parts if "weight" in part.trainable_parameters()]
    trained_linear = sum(_linear_weights(part, experts) for part in trained)
    return ModelFlops(
        linear=sum(linear),
        linear_backward=sum(linear[first:]),
        adapters=sum(_adapter_weights(part, experts) for part in parts),
        attention=sum(attention),
        attention_backward=sum(attention[first:]),
        head=vocab_size * (model_width(entries) or 0),
        trained_linear=trained_linear if has_master_weights(model) else 0,
    )


def count_attended_keys(pairs: Iterable[TokenizedPair], *, shared: bool) -> int:
    """Return the number of keys attended to in one layer, summed over all queries of all pairs.

    Sliding windows are not taken into account.

    Args:
        shared: True if the prompt of a pair runs once, False if it runs once per completion.
    """
    return sum(_pair_attended_keys(pair, shared) for pair in pairs)


def _pair_attended_keys(pair: TokenizedPair, shared: bool) -> int:
    """Return the number of keys attended to in one layer, summed over the queries of a pair.

    `shared` says whether the prompt runs once instead of once per completion.
    """
    prompt = len(pair.prompt)
    completions = [completion for completion in (pair.chosen, pair.rejected) if completion]
    lengths = [prompt + len(completion) - 1 for completion in completions]
    saved = (len(lengths) - 1) * _causal_entries(prompt) if shared else 0
    return sum(map(_causal_entries, lengths)) - saved


def _causal_entries(length: int) -> int:
    """Return the number of unmasked entries of a causal mask of shape (length, length)."""
    return length * (length + 1) // 2


def _linear_weights(part: nn.Module, experts: int | None) -> int:
    """Return the number of weights of a linear layer that each token is multiplied with.

    In a layer of experts, only the experts used per token are counted. The result is 0 for modules
    that are not linear layers.
    """
    weight = part.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim not in (2, 3):
        return 0
    if isinstance(part, nn.Embedding | nn.QuantizedEmbedding):
        return 0
    bits = part.bits if "scales" in part and hasattr(part, "bits") else 32
    used = 1 if weight.ndim == 2 else min(experts or weight.shape[0], weight.shape[0])
    return used * weight.shape[-2] * (weight.shape[-1] * 32 // bits)


def _attention_widths(model: nn.Module, entries: Mapping[str, Any]) -> Sequence[int]:
    """Return the number of attention heads times the head width, for each layer.

    Recurrent layers have a width of 0.
    """
    heads = int(entries.get("num_attention_heads") or entries.get("n_head") or 0)
    hidden = model_width(entries) or 0
    width = int(entries.get("head_dim") or (hidden // heads if heads else 0))
    caches = make_prompt_cache(model)
    recurrent = [isinstance(cache, ArraysCache) for cache in caches]
    recurrent += [False] * (len(model.layers) - len(recurrent))
    return [0 if is_recurrent else heads * width for is_recurrent in recurrent]


def _adapter_weights(part: nn.Module, experts: int | None) -> int:
    """Return the number of weights of an adapter that each token is multiplied with.

    On a layer of experts, only the experts used per token are counted. The result is 0 for modules
    that are not adapters.
    """
    if not isinstance(part, ADAPTER_TYPES):
        return 0
    a, b = part.lora_a, part.lora_b
    used = 1 if a.ndim == 2 else min(experts or a.shape[0], a.shape[0]) / a.shape[0]
    return int(used * (a.size + b.size))


WIDTH_NAMES = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")


def model_width(entries: Mapping[str, Any]) -> int | None:
    """Return the width of the hidden states that a model's `config.json` states, or None."""
    for part in (entries, entries.get("text_config") or {}):
        for name in WIDTH_NAMES:
            if width := part.get(name):
                return int(width)
    return None
