"""Softmax for those who write their own gradients: on the CPU in passes that it vectorises.

MLX's CPU backend computes exp one element at a time, some four times slower than the passes
here, whose result is as near to the true one. The exponent is put together bit by bit, so
MLX cannot differentiate it.
"""

import math

import mlx.core as mx

LOG2_E = math.log2(math.e)
# Added and subtracted, it rounds to a whole number and leaves that number in the low bits.
ROUND = 1.5 * 2**23
LOWEST = -125.0  # the last power of two but one that float32 holds in full precision
# 2^r for r within a half, highest power first; relative error 1e-8, below float32's rounding.
COEFFICIENTS = (
    1.5337577e-4,
    1.3399860e-3,
    9.6185195e-3,
    5.5503290e-2,
    2.4022647e-1,
    6.9314721e-1,
    1.0,
)


def softmax(scores: mx.array) -> mx.array:
    """Over the last axis, in float32 at least. Shape and type of the scores"""
    if not on_cpu() or scores.dtype == mx.float64:
        return mx.softmax(scores, axis=-1, precise=True)
    x = scores.astype(mx.float32)
    weights = exp(x - x.max(axis=-1, keepdims=True))
    return (weights * (1 / weights.sum(axis=-1, keepdims=True))).astype(scores.dtype)


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


def exp(x: mx.array) -> mx.array:
    """e^x - 2^-125 for -86 <= x <= 88, and 0 below; NaN stays NaN. Shape of x, float32"""
    power = mx.maximum(x * LOG2_E, LOWEST)
    shifted = power + ROUND
    rest = power - (shifted - ROUND)
    mantissa = rest * COEFFICIENTS[0] + COEFFICIENTS[1]
    for coefficient in COEFFICIENTS[2:]:
        mantissa = mantissa * rest + coefficient
    exponent = shifted.view(mx.int32) << 23
    # At the bound the difference is 0, not a number next to nothing: products with those leave
    # float32's normal range, where the CPU is a hundred times slower.
    return (exponent + mantissa.view(mx.int32)).view(mx.float32) - 2.0**LOWEST
