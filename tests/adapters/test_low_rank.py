"""The adapter's product against MLX's own gradient of it."""

import mlx.core as mx
import pytest

from mlx_dpo.adapters.layers import add_low_rank


@pytest.mark.parametrize("batch", [(7,), (2, 7), (2, 3, 4)])
def test_value_and_gradients_equal_those_of_the_formula(batch):
    mx.random.seed(2)
    y, cotangent = mx.random.normal((*batch, 11)), mx.random.normal((*batch, 11))
    x, a, b = mx.random.normal((*batch, 6)), mx.random.normal((6, 3)), mx.random.normal((3, 11))

    def plain(y, x, a, b):
        return y + 1.7 * ((x @ a) @ b)

    def ours(y, x, a, b):
        return add_low_rank(y, x, a, b, 1.7)

    for found, known in zip(
        mx.vjp(ours, [y, x, a, b], [cotangent]),
        mx.vjp(plain, [y, x, a, b], [cotangent]),
        strict=True,
    ):
        for result, other in zip(found, known, strict=True):
            assert result.shape == other.shape
            assert mx.allclose(result, other, rtol=1e-5, atol=1e-5)
