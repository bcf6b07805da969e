"""The fused recurrence against mlx-lm's own, called as the models call it."""

from importlib import import_module

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta, kimi_linear, qwen3_next

from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from tests.scoring.small_models import distance, loss_and_gradients, make, shared_prompt, whole


def arrays(*, batch=2, length=23, seed=0, dtype=mx.float32):
    """q, k, v, a, b, A_log, dt_bias, state of 2 key heads and 4 value heads."""
    mx.random.seed(seed)
    shapes = [(2, 8), (2, 8), (4, 6), (4,), (4,)]
    data = [mx.random.normal((batch, length, *shape)).astype(dtype) for shape in shapes]
    q, k, v, a, b = data
    state = mx.random.normal((batch, 4, 6, 8))
    return [0.3 * q, 0.3 * k, v, a, b, mx.random.normal((4,)), mx.random.normal((4,)), state]


@pytest.fixture
def fused():
    """What the models call inside the block."""
    with use_fused_gated_delta(make("qwen3_next")) as files:
        assert files == 1
        return qwen3_next.gated_delta_update


def values_and_gradients(update, data, visible=None, **options):
    """Outputs where `visible`, last state, and gradients of all that went in."""

    def outputs(*data):
        out, state = update(*data, visible, **options)
        return out if visible is None else out * visible[..., None, None], state

    def loss(*data):
        return sum(
            (part * mx.sin(mx.arange(part.size)).reshape(part.shape)).sum()
            for part in outputs(*data)
        )

    return [*outputs(*data), *mx.grad(loss, argnums=list(range(len(data))))(*data)]


LENGTHS = mx.array([[23], [9]])


@pytest.mark.parametrize("visible", [None, mx.arange(23) < LENGTHS, mx.arange(23) >= 23 - LENGTHS])
@pytest.mark.parametrize("options", [{}, {"allow_neg_eigval": True}, {"lower_bound": -5.0}])
def test_values_and_all_gradients_are_those_of_mlx_lm(fused, visible, options):
    data = arrays()
    plain = values_and_gradients(gated_delta.gated_delta_update, data, visible, **options)
    ours = values_and_gradients(fused, data, visible, **options)
    for result, expected in zip(ours, plain, strict=True):
        assert result.dtype == expected.dtype
        assert mx.allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_without_a_state_the_recurrence_starts_from_zero(fused):
    data = arrays()
    zero = fused(*data[:-1], mx.zeros_like(data[-1]))
    for result, expected in zip(fused(*data[:-1]), zero, strict=True):
        assert mx.array_equal(result, expected)


def test_a_long_memory_in_bfloat16_is_not_rounded_away(fused):
    """A decay of 0.999 over 400 tokens leaves 0.67; rounded to bfloat16 it would be 1."""
    q, k, v, a, b, _, dt_bias, state = arrays(length=400, dtype=mx.bfloat16)
    log_rate = mx.full((4,), -6.9)
    a, b, dt_bias = mx.full(a.shape, 0.5413), b - 50, mx.zeros_like(dt_bias)
    _, end = fused(q, k, v, a, b, log_rate, dt_bias, state)
    _, expected = gated_delta.gated_delta_update(q, k, v, a, b, log_rate, dt_bias, state)
    assert mx.allclose(end, expected, rtol=1e-5)
    assert mx.allclose(end, 0.67 * state, rtol=0.01)


@pytest.mark.parametrize("scores", [whole, shared_prompt])
def test_a_hybrid_model_gets_the_same_gradients(scores):
    model = make("qwen3_next")
    loss, gradients = loss_and_gradients(model, scores)
    with use_fused_gated_delta(model):
        again, ours = loss_and_gradients(model, scores)
    assert again == pytest.approx(loss, abs=2e-4)
    assert distance(ours, gradients) < 1e-5


def test_training_and_evaluation_use_the_same_recurrence(monkeypatch):
    calls = []
    own = mx.fast.gated_delta_update
    monkeypatch.setattr(mx.fast, "gated_delta_update", lambda *a: calls.append(1) or own(*a))
    model = make("qwen3_next")
    with use_fused_gated_delta(model):
        trained = model.train()(mx.array([[1, 2, 3]]))
        scored = model.eval()(mx.array([[1, 2, 3]]))
    assert mx.array_equal(trained, scored)
    layers = sum(layer.is_linear for layer in model.layers)
    assert len(calls) == 2 * layers > 0


def test_a_gate_per_channel_uses_mlx_lm(fused, monkeypatch):
    monkeypatch.delattr(mx.fast, "gated_delta_update")
    q, k, v, a, b, log_rate, dt_bias, state = arrays()
    q, k = mx.repeat(q, 2, axis=2), mx.repeat(k, 2, axis=2)
    a, log_rate, dt_bias = mx.random.normal((*a.shape, 8)), log_rate[:, None], dt_bias[:, None]
    data = [q, k, v, a, b, log_rate, dt_bias]
    result = fused(*data, state=state, use_kernel=False)
    for ours, theirs in zip(result, gated_delta.gated_delta_update(*data, state), strict=True):
        assert mx.array_equal(ours, theirs)


def test_only_the_modules_of_the_model_change_and_are_restored_after_an_error():
    own = gated_delta.gated_delta_update
    with pytest.raises(KeyError), use_fused_gated_delta(make("qwen3_next")):
        assert qwen3_next.gated_delta_update is not own
        assert kimi_linear.gated_delta_update is own
        assert gated_delta.gated_delta_update is own
        raise KeyError
    assert qwen3_next.gated_delta_update is own


def test_a_model_without_the_recurrence_is_not_changed():
    with use_fused_gated_delta(make("llama")) as files:
        assert files == 0


@pytest.mark.parametrize(
    "kind", ["bailing_moe_v3", "kimi_linear", "olmo_hybrid", "qwen3_5", "qwen3_next"]
)
def test_models_of_mlx_lm_import_the_recurrence_by_this_name(kind):
    assert (
        import_module(f"mlx_lm.models.{kind}").gated_delta_update is gated_delta.gated_delta_update
    )
