import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.scoring.kernels import take_rows as module
from mlx_dpo.scoring.kernels.take_rows import take_rows
from scripts.bench.kernels import count_kernels

indices = st.lists(st.integers(0, 7), min_size=1, max_size=30)


def value_and_gradient(function, shape):
    x = mx.arange(math.prod(shape)).reshape(shape).astype(mx.float32)
    rows = function(x)
    weights = mx.random.normal(rows.shape, key=mx.random.key(3))
    return rows, mx.grad(lambda x: (function(x) * weights).sum())(x)


@given(indices, st.sampled_from([(8,), (8, 3)]))
def test_rows_and_gradients_are_those_of_an_index(found, shape):
    at = mx.array(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "is_cpu", lambda: False)
        rows, gradient = value_and_gradient(lambda x: take_rows(x, at), shape)
    expected, expected_gradient = value_and_gradient(lambda x: x[at], shape)
    assert mx.array_equal(rows, expected)
    assert mx.allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


@given(indices)
def test_no_gradient_is_a_sum_of_more_than_two_in_one_scatter(found):
    """A GPU adds them in any order."""
    taken = []

    class Recorded:
        """An array that records with which indices its rows are taken."""

        def __init__(self, values):
            self.values = values

        def __getitem__(self, at):
            taken.append(at.tolist())
            return Recorded(self.values[at])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "is_cpu", lambda: False)
        patch.setattr(
            mx,
            "concatenate",
            lambda parts: Recorded(mx.array(np.concatenate([p.values for p in parts]))),
        )
        source: Any = Recorded(mx.arange(8))
        rows: Any = take_rows(source, mx.array(found))
    assert rows.values.tolist() == found
    assert all(at.count(row) <= 2 for at in taken for row in at)


def test_ordinary_pairs_start_no_more_kernels(monkeypatch):
    """Both completions of a pair begin behind the same token; no other row is taken twice."""
    at, x = mx.array([3, 4, 3, 5]), mx.zeros((8, 2))
    monkeypatch.setattr(module, "is_cpu", lambda: False)
    assert count_kernels([take_rows(x, at)]) == count_kernels([x[at]])
