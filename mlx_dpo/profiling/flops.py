"""How many floating-point operations a pass takes, from the shapes of a model.

A multiplication and an addition count as two. Only products of matrices are counted; norms,
activations, softmax and recurrences are a small part of the work, though not of the time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_dpo.adapters.layers import ADAPTER_TYPES
from mlx_dpo.adapters.master_weights import has_master_weights
from mlx_dpo.profiling.layer_subset import first_trained_layer
from mlx_dpo.types import TokenizedPair

# Names that architectures have for the number of experts that a token meets.
EXPERTS_PER_TOKEN_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip


@dataclass(frozen=True)
class TokenCounts:
    """What goes through a model in some passes."""

    trunk: int  # tokens through the blocks, padding included
    head: int  # rows through the head
    seen: int  # keys that the queries of a layer see, added up


@dataclass(frozen=True)
class ModelFlops:
    """Operations per unit of a model, adapters attached.

    With t tokens through the blocks, h rows through the head and s keys seen, a pass takes

        forward   2 (W + A) t + 4 K s + 2 H h
        backward  2 W' t + 4 A t + 2 F t + 10 K' s + 2 H h
        again     2 (W' + A) t + 4 K' s              with recomputation

    W are the weights of the linear layers that a token meets, A those of the adapters, F those
    of W that are trained themselves, H of the head, K the heads times their width, over all
    layers with attention. W' and K' are of the blocks from the first that is trained on, for
    gradients go no further down. Backward, frozen weights get no gradient, and attention is five
    products: its scores once more, and one each towards probabilities, values, queries and keys.
    """

    linear: int
    linear_reached: int
    adapters: int
    attention: int
    attention_reached: int
    head: int
    tuned: int = 0

    def forward(self, tokens: TokenCounts, *, adapted: bool = True) -> int:
        """Operations of a pass without gradients."""
        weights = self.linear + (self.adapters if adapted else 0)
        products = weights * tokens.trunk + self.head * tokens.head
        return 2 * products + 4 * self.attention * tokens.seen

    def training(self, tokens: TokenCounts, *, recompute: bool) -> int:
        """Operations of a pass with gradients, both ways."""
        back = 2 * (self.linear_reached + 2 * self.adapters + self.tuned) * tokens.trunk
        back += 10 * self.attention_reached * tokens.seen + 2 * self.head * tokens.head
        again = 2 * (self.linear_reached + self.adapters) * tokens.trunk
        again += 4 * self.attention_reached * tokens.seen
        return self.forward(tokens) + back + (again if recompute else 0)


def model_flops(model: nn.Module, config: Mapping[str, Any], *, vocab_size: int) -> ModelFlops:
    """Operations per unit, from shapes and, for attention and experts, `config.json`."""
    entries = {**config, **(config.get("text_config") or {})}
    experts = next(
        (int(entries[name]) for name in EXPERTS_PER_TOKEN_KEYS if entries.get(name)), None
    )
    blocks = list(model.layers)
    linear = [sum(_linear_weights(part, experts) for part in block.modules()) for block in blocks]
    attention = _attention_widths(model, entries)
    first = first_trained_layer(model)
    parts = [part for block in blocks for part in block.modules()]
    trained = [part for part in parts if "weight" in part.trainable_parameters()]
    return ModelFlops(
        linear=sum(linear),
        linear_reached=sum(linear[first:]),
        adapters=sum(_adapter_weights(part, experts) for part in parts),
        attention=sum(attention),
        attention_reached=sum(attention[first:]),
        head=vocab_size * int(entries.get("hidden_size") or entries.get("n_embd") or 0),
        tuned=sum(_linear_weights(part, experts) for part in trained)
        if has_master_weights(model)
        else 0,
    )


def count_attended_keys(pairs: Iterable[TokenizedPair], *, shared: bool) -> int:
    """Keys that queries see in one layer, over all pairs; a window of attention is not counted."""
    return sum(_pair_attended_keys(pair, shared) for pair in pairs)


def _pair_attended_keys(pair: TokenizedPair, shared: bool) -> int:
    prompt = len(pair.prompt)
    ends = [prompt + len(completion) - 1 for completion in (pair.chosen, pair.rejected)]
    once = (len(ends) - 1) * _causal_entries(prompt) if shared else 0
    return sum(map(_causal_entries, ends)) - once


def _causal_entries(length: int) -> int:
    return length * (length + 1) // 2


def _linear_weights(part: nn.Module, experts: int | None) -> int:
    """Weights of a linear layer that a token meets; 0 for any other part."""
    weight = part.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim not in (2, 3):
        return 0
    if isinstance(part, nn.Embedding | nn.QuantizedEmbedding):
        return 0
    bits = part.bits if "scales" in part and hasattr(part, "bits") else 32
    met = 1 if weight.ndim == 2 else min(experts or weight.shape[0], weight.shape[0])
    return met * weight.shape[-2] * (weight.shape[-1] * 32 // bits)


def _attention_widths(model: nn.Module, entries: Mapping[str, Any]) -> Sequence[int]:
    """Heads times their width in each block, 0 where it has a state in place of attention."""
    heads = int(entries.get("num_attention_heads") or entries.get("n_head") or 0)
    hidden = int(entries.get("hidden_size") or entries.get("n_embd") or 0)
    width = int(entries.get("head_dim") or (hidden // heads if heads else 0))
    caches = make_prompt_cache(model)
    recurrent = [isinstance(cache, ArraysCache) for cache in caches]
    recurrent += [False] * (len(model.layers) - len(recurrent))
    return [0 if is_recurrent else heads * width for is_recurrent in recurrent]


def _adapter_weights(part: nn.Module, experts: int | None) -> int:
    """Weights of an adapter that a token meets; 0 for any other part."""
    if not isinstance(part, ADAPTER_TYPES):
        return 0
    a, b = part.lora_a, part.lora_b
    met = 1 if a.ndim == 2 else min(experts or a.shape[0], a.shape[0]) / a.shape[0]
    return int(met * (a.size + b.size))
