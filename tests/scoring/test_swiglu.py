"""The gate of an MLP against mlx-lm's own."""

import mlx.core as mx
import pytest
from mlx_lm.models import activations, llama

from mlx_dpo.scoring.kernels.swiglu import swiglu, use_fast_swiglu
from tests.conftest import make_llama


def both(function, *arrays, cotangent):
    [out], gradients = mx.vjp(lambda *a: function(*a), list(arrays), [cotangent])
    return [out, *gradients]


@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_value_and_gradients_are_those_of_mlx_lm(spread):
    mx.random.seed(1)
    gate, x, cotangent = (mx.random.normal((3, 5, 40)) for _ in range(3))
    given = spread * gate, x
    found = both(swiglu, *given, cotangent=cotangent)
    known = both(activations.swiglu, *given, cotangent=cotangent)
    for ours, theirs in zip(found, known, strict=True):
        assert mx.abs(ours - theirs).max().item() <= 2e-6 * mx.abs(theirs).max().item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bits_are_left_to_mlx_lm_whose_error_is_that_of_one_rounding(dtype):
    gate = mx.linspace(-7, 20, 400).astype(dtype)
    exact = activations.swiglu(gate.astype(mx.float32), mx.ones((400,)))
    ours, theirs = (
        swiglu(gate, mx.ones((400,), dtype)),
        activations.swiglu(gate, mx.ones((400,), dtype)),
    )
    assert ours.dtype == dtype and mx.array_equal(ours, theirs)
    assert mx.abs(ours / exact - 1).max().item() < 0.02


def test_it_is_exchanged_in_the_model_s_source_and_put_back_also_after_an_error():
    model = make_llama()
    assert llama.swiglu is activations.swiglu
    with pytest.raises(KeyError), use_fast_swiglu(model):
        assert llama.swiglu is swiglu
        raise KeyError
    assert llama.swiglu is activations.swiglu


def test_a_gpu_keeps_its_own(monkeypatch):
    monkeypatch.setattr("mlx_dpo.scoring.kernels.swiglu.is_cpu", lambda: False)
    with use_fast_swiglu(make_llama()):
        assert llama.swiglu is activations.swiglu
