"""A Llama model in NumPy and float64, independent of mlx-lm: the reference of the self-test.

MLX is only used to read the weights of the model under test.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.types import PairBatch

Array = np.ndarray[Any, np.dtype[np.float64]]
Weights = dict[str, Array]


def dequantized_weights(model: nn.Module) -> Weights:
    """Return all weights of a model by name in float64; quantized weights are dequantized."""
    weights = {  # NumPy has no bfloat16; packed weights are integers and stay integers
        name: value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in named_arrays(model.parameters()).items()
    }
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weights[f"{path}.weight"] = mx.dequantize(
                module.weight,
                weights.pop(f"{path}.scales"),
                weights.pop(f"{path}.biases"),
                group_size=module.group_size,
                bits=module.bits,
            )
    return {name: np.array(value, np.float64) for name, value in weights.items()}


def completion_logps(weights: Weights, args: Any, scale: float, batch: PairBatch) -> Array:
    """Return the log-prob of each row's completion: the sum over its scored tokens. (N,)"""
    tokens, mask = np.array(batch.tokens), np.array(batch.completion_mask)
    logits = _logits(weights, args, scale, tokens)
    maximum = logits.max(axis=-1, keepdims=True)
    logps = logits - maximum - np.log(np.exp(logits - maximum).sum(axis=-1, keepdims=True))
    rows, length = tokens.shape
    return np.array(
        [
            sum(logps[n, t - 1, tokens[n, t]] for t in range(1, length) if mask[n, t])
            for n in range(rows)
        ]
    )


def _logits(weights: Weights, args: Any, scale: float, tokens: Array) -> Array:
    def linear(name: str, x: Array) -> Array:
        if f"{name}.lora_a" not in weights:
            return x @ weights[f"{name}.weight"].T
        product = weights[f"{name}.lora_a"] @ weights[f"{name}.lora_b"]
        return x @ (weights[f"{name}.linear.weight"].T + scale * product)

    def norm(name: str, x: Array) -> Array:
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + args.rms_norm_eps) * weights[f"{name}.weight"]

    x = weights["model.embed_tokens.weight"][tokens]
    for number in range(args.num_hidden_layers):
        layer = f"model.layers.{number}"
        h = norm(f"{layer}.input_layernorm", x)
        q, k, v = (linear(f"{layer}.self_attn.{part}_proj", h) for part in "qkv")
        x = x + linear(f"{layer}.self_attn.o_proj", _attention(q, k, v, args))
        h = norm(f"{layer}.post_attention_layernorm", x)
        gate = linear(f"{layer}.mlp.gate_proj", h)
        up = linear(f"{layer}.mlp.up_proj", h)
        x = x + linear(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    return linear("lm_head", norm("model.norm", x))


def _attention(q: Array, k: Array, v: Array, args: Any) -> Array:
    """Return the output of causal grouped-query attention. (N, T, D)"""
    rows, length, width = q.shape
    size = width // args.num_attention_heads
    q, k, v = (part.reshape(rows, length, -1, size).transpose(0, 2, 1, 3) for part in (q, k, v))
    repeats = args.num_attention_heads // args.num_key_value_heads
    q, k, v = _apply_rope(q, args), _apply_rope(k, args).repeat(repeats, 1), v.repeat(repeats, 1)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(size)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    probabilities = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    output: Array = (probabilities @ v).transpose(0, 2, 1, 3).reshape(rows, length, width)
    return output


def _apply_rope(x: Array, args: Any) -> Array:
    """Apply rotary position embeddings; dimensions i and i + size / 2 form a pair.

    Shape (N, heads, T, size), as that of `x`.
    """
    length, size = x.shape[-2:]
    frequencies = args.rope_theta ** (-np.arange(0, size, 2) / size)
    angles = np.arange(length)[:, None] * frequencies
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            first * np.sin(angles) + second * np.cos(angles),
        ],
        axis=-1,
    )
