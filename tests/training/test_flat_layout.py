"""Gradients in one flat array per dtype, in which ranks exchange them."""

import mlx.core as mx

from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.training.accumulate import _FlatLayout


def test_gradients_of_two_dtypes_keep_the_order_of_the_tree():
    """The gradient norm is summed in that order, so that another one changes its last bits."""
    tree = {
        "layers": [
            {"a": mx.ones((2, 3)), "b": mx.full((4,), 2.0, mx.bfloat16)},
            {"a": mx.full((3, 2), 3.0), "b": mx.full((2,), 4.0, mx.bfloat16)},
        ],
        "head": mx.full((5,), 6.0, mx.bfloat16),
        "norm": mx.full((1,), 7.0),
    }
    weights = named_arrays(tree)
    layout = _FlatLayout(weights)
    found = named_arrays(layout.unflatten(layout.flatten(tree)))
    assert list(found) == list(weights)
    for name, value in weights.items():
        assert found[name].dtype == value.dtype
        assert mx.array_equal(found[name], value), name
