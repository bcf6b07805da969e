"""Exponential and log-sum-exp against float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.scoring.kernels.softmax import blockwise_logsumexp, exp, logsumexp, target_logps


def float64(logits):
    x = np.array(logits, dtype=np.float64)
    top = x.max(axis=-1, keepdims=True)
    return np.log(np.exp(x - top).sum(axis=-1)) + top.squeeze(-1)


@pytest.mark.parametrize("vocab", [2, 7, 64, 1536, 49152, 151936])
def test_small_terms_are_not_lost_next_to_a_large_one(vocab):
    """MLX's own sum on the CPU is off by 2e-4 at 49,152 here."""
    logits = mx.array(np.random.default_rng(0).normal(size=(8, vocab)).astype(np.float32) * 3)
    logits[:, 1] += 12
    for result in (blockwise_logsumexp(logits), logsumexp(logits)):
        assert result.shape == (8,)
        assert np.abs(np.array(result) - float64(logits)).max() < 5e-6


def test_the_gradient_is_the_softmax():
    logits = mx.array([[1.0, 2.0, 4.0, -1.0, 0.5]])
    weights = mx.array([[2.0]])
    grad = mx.grad(lambda x: (weights * blockwise_logsumexp(x)).sum())(logits)
    assert mx.allclose(grad, 2 * mx.softmax(logits, axis=-1), atol=1e-6)


@pytest.mark.parametrize("vocab", [2, 7, 64, 1000])
def test_log_probs_of_targets_and_their_gradient(vocab):
    rng = np.random.default_rng(0)
    logits = mx.array(rng.normal(size=(2, 3, vocab)).astype(np.float32))
    targets = mx.array(rng.integers(0, vocab, (2, 3)))
    weights = mx.array(rng.normal(size=(2, 3)).astype(np.float32))

    def taken(x):
        return mx.take_along_axis(x, targets[..., None], axis=-1).squeeze(-1)

    ours, theirs = (
        mx.vjp(function, [logits], [weights])
        for function in (lambda x: target_logps(x, targets), lambda x: taken(x) - logsumexp(x))
    )
    truth = np.array(taken(logits), dtype=np.float64) - float64(logits)
    assert np.abs(np.array(ours[0][0]) - truth).max() < 5e-6
    assert mx.array_equal(ours[0][0], theirs[0][0])
    assert mx.array_equal(ours[1][0], theirs[1][0])


def test_infinite_and_large_logits_are_exact():
    logits = mx.array([[-mx.inf, 3.0, -mx.inf, 3.0], [1000.0, 1000.0, -mx.inf, -1000.0]])
    assert blockwise_logsumexp(logits).tolist() == pytest.approx([3 + np.log(2), 1000 + np.log(2)])
    assert mx.isfinite(mx.grad(lambda x: blockwise_logsumexp(x).sum())(logits)).all()


def test_exp_is_accurate_to_single_precision():
    x = mx.linspace(-60, 60, 20001)
    truth = [math.exp(value) for value in x.tolist()]
    errors = [abs(ours / true - 1) for ours, true in zip(exp(x).tolist(), truth, strict=True)]
    theirs = [abs(own / true - 1) for own, true in zip(mx.exp(x).tolist(), truth, strict=True)]
    assert max(errors) < 1.1 * max(theirs)
    assert max(errors[9900:10101]) < 3e-7  # |x| < 0.3, where x log2(e) is not yet rounded much


def test_exp_of_extreme_values():
    assert exp(mx.array([0.0, -1000.0, -mx.inf, -1e38])).tolist() == [1, 0, 0, 0]
    assert exp(mx.array([88.0])).item() == pytest.approx(math.exp(88), rel=1e-5)
    assert math.isnan(exp(mx.array([mx.nan])).item())
