"""The product of two thin matrices added to a linear layer's output, with its own gradient.

MLX's own gradient of it makes several passes over arrays as wide as the layer. Written out,
each product is thin, the scale is multiplied in where arrays are narrow, and nothing but the
layer's input and x A is kept.
"""

from typing import Any, cast

import mlx.core as mx


def add_low_rank(y: mx.array, x: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """y + scale (x A) B. (..., out), (..., in), (in, r), (r, out) -> (..., out)

    All of one number type, in which the products are taken.
    """
    thin = mx.stop_gradient(x) @ mx.stop_gradient(a)  # outside, so that it is kept

    @mx.custom_function
    def add(y: mx.array, x: mx.array, a: mx.array, b: mx.array, thin: mx.array) -> mx.array:
        return mx.addmm(y, thin, b, alpha=scale)

    @add.vjp
    def add_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        _, x, a, b, thin = primals
        out = cotangent.flatten(0, -2)  # (n, out), as all below
        back = scale * (out @ b.T)  # (n, r)
        return [
            cotangent,
            (back @ a.T).reshape(x.shape),
            x.flatten(0, -2).T @ back,
            scale * (thin.flatten(0, -2).T @ out),
            mx.zeros_like(thin),
        ]

    return cast(mx.array, add(y, x, a, b, thin))
