"""RoPE with one position per token: the table of the CPU and the kernel of a GPU are the same."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dpo.scoring.kernels import rope
from mlx_dpo.scoring.kernels.rope import TokenPositions, use_token_positions

POSITIONS = np.array([0, 1, 2, 3, 4, 2, 3, 70, 71, 0, 1, 0])
ROTATIONS = {
    "plain": nn.RoPE(8),
    "traditional": nn.RoPE(8, traditional=True, base=500.0),
    "partial": nn.RoPE(4, scale=0.5),
}


def rotated(x, function):
    """The rotated numbers, and gradients of a weighted sum of them that tells all apart."""
    offset = TokenPositions(POSITIONS)

    def loss(x):
        out = function(x, offset=offset)
        return (out * mx.sin(mx.arange(out.size)).reshape(out.shape)).sum()

    with use_token_positions():
        return function(x, offset=offset), mx.grad(loss)(x)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", ROTATIONS)
def test_a_gpu_rotates_each_token_by_its_position(monkeypatch, name, dtype):
    """A GPU's arithmetic, run on the CPU: tokens as sequences of one token with an offset each."""
    mx.random.seed(0)
    x = mx.random.normal((1, 12, 3, 8)).astype(dtype).transpose(0, 2, 1, 3)  # as models pass it
    expected = rotated(x, ROTATIONS[name])
    monkeypatch.setattr(rope, "is_cpu", lambda: False)
    for ours, theirs in zip(rotated(x, ROTATIONS[name]), expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        tolerance = 1e-5 if dtype == mx.float32 else 0.05
        assert mx.allclose(ours, theirs, atol=tolerance)
