import mlx.core as mx
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch
from mlx_dpo.training.step import clip_grad_norm, loss_and_gradients
from mlx_dpo.types import PairLogps
from tests.conftest import make_llama

BETA = 0.5
OBJECTIVE = Objective(LossSettings(beta=BETA))


@pytest.fixture
def policy():
    model = make_llama()
    adapters.attach_adapters(model, rank=4, scale=2.0, seed=1)
    mx.random.seed(5)
    for module in adapters.adapted_layers(model).values():
        module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    return model


def micro(pairs, at=0.0):
    reference = mx.array([at - 3.0 * len(pair.chosen) for pair in pairs])
    return MicroBatch.of(pairs, PairLogps(reference, reference + 1.0))


def gradients(policy, parts):
    outputs, grads = loss_and_gradients(policy, OBJECTIVE, [micro(part) for part in parts])
    return outputs, named_arrays(grads)


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_accumulating_equals_one_batch(policy, pairs, cuts):
    """Parts of unequal size too: a mean of means would weigh the lone pair four times."""
    parts, rest = [], list(pairs)
    for size in cuts:
        parts.append(rest[:size])
        rest = rest[size:]
    outcome, pieces = gradients(policy, parts)
    together, whole = gradients(policy, [pairs])
    assert mx.allclose(outcome.losses, together.losses, atol=1e-5)
    for name, value in whole.items():
        assert mx.allclose(pieces[name], value, atol=1e-6, rtol=1e-4), name


def test_the_gradient_is_the_gradient_of_the_mean_loss(policy, pairs):
    """Against central differences of the loss in float32, along a random direction."""
    _, grads = gradients(policy, [pairs[:2], pairs[2:]])
    start = adapters.adapter_weights(policy)
    mx.random.seed(11)
    direction = {name: mx.random.normal(value.shape) for name, value in start.items()}

    def mean_loss(shift):
        policy.load_weights([(n, v + shift * direction[n]) for n, v in start.items()], strict=False)
        outcome, _ = gradients(policy, [pairs])
        return outcome.losses.mean().item()

    step = 1e-3
    measured = (mean_loss(step) - mean_loss(-step)) / (2 * step)
    along = sum((grads[name] * direction[name]).sum().item() for name in grads)
    assert along == pytest.approx(measured, rel=2e-2)


def test_only_the_adapters_have_gradients(policy, pairs):
    _, grads = gradients(policy, [pairs])
    assert grads.keys() == adapters.adapter_weights(policy).keys()


def test_clipping_bounds_the_global_norm_and_says_what_it_was():
    grads = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    clipped, norm = clip_grad_norm(grads, 1.0)
    assert norm.item() == 5.0
    assert clipped["a"].tolist() == pytest.approx([0.6, 0.0], abs=1e-5)
    assert clipped["b"].item() == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bit_gradients_are_measured_and_clipped_in_float32(dtype):
    """Squares of 40 000 overflow float16, and 4 096 ones added up in bfloat16 stay at 256."""
    grads = {"a": mx.full((4096,), 1.0, dtype), "b": mx.array([40000.0, -40000.0], dtype)}
    large = 39936.0 if dtype == mx.bfloat16 else 40000.0  # as the type holds it
    expected = (4096 + 2 * large**2) ** 0.5
    clipped, norm = clip_grad_norm(grads, 100.0)
    assert norm.dtype == mx.float32
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    assert {value.dtype for value in clipped.values()} == {dtype}
    assert clipped["b"].tolist() == pytest.approx([70.7, -70.7], rel=5e-3)
    assert clip_grad_norm({"a": grads["a"]}, 0.0)[1].item() == 64.0


@pytest.mark.parametrize("bound", [0.0, 10.0])
def test_without_a_bound_or_below_it_nothing_is_clipped(bound):
    clipped, norm = clip_grad_norm({"a": mx.array([3.0, 4.0])}, bound)
    assert norm.item() == 5.0
    assert clipped["a"].tolist() == [3.0, 4.0]
