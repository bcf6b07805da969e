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
    result = both(swiglu, *given, cotangent=cotangent)
    known = both(activations.swiglu, *given, cotangent=cotangent)
    for ours, theirs in zip(result, known, strict=True):
        assert mx.abs(ours - theirs).max().item() <= 2e-6 * mx.abs(theirs).max().item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bits_use_mlx_lm(dtype):
    gate = mx.linspace(-7, 20, 400).astype(dtype)
    exact = activations.swiglu(gate.astype(mx.float32), mx.ones((400,)))
    ours, theirs = (
        swiglu(gate, mx.ones((400,), dtype)),
        activations.swiglu(gate, mx.ones((400,), dtype)),
    )
    assert ours.dtype == dtype and mx.array_equal(ours, theirs)
    assert mx.abs(ours / exact - 1).max().item() < 0.02


def test_swiglu_is_replaced_in_the_model_s_module_and_restored_after_an_error():
    model = make_llama()
    assert llama.swiglu is activations.swiglu
    with pytest.raises(KeyError), use_fast_swiglu(model):
        assert llama.swiglu is swiglu
        raise KeyError
    assert llama.swiglu is activations.swiglu


def test_a_gpu_keeps_mlx_lm_s_swiglu(monkeypatch):
    monkeypatch.setattr("mlx_dpo.scoring.kernels.swiglu.is_cpu", lambda: False)
    with use_fast_swiglu(make_llama()):
        assert llama.swiglu is activations.swiglu


def test_mlx_lm_s_own_module_is_restored():
    """A model may use a layer that is defined in the same module as the function."""
    model = make_llama()
    model.activation = activations.SwigluOAI()
    original = activations.swiglu
    gate = mx.ones((2,), mx.bfloat16)
    with use_fast_swiglu(model):
        assert activations.swiglu is swiglu
        assert mx.array_equal(swiglu(gate, gate), original(gate, gate))
    assert activations.swiglu is original
