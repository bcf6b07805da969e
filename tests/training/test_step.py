from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.scoring.scorers import plain_scorer
from mlx_dpo.training import accumulate
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch
from mlx_dpo.training.step import loss_and_gradients
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

    shift = 1e-3
    measured = (mean_loss(shift) - mean_loss(-shift)) / (2 * shift)
    along = sum((grads[name] * direction[name]).sum().item() for name in grads)
    assert along == pytest.approx(measured, rel=2e-2)


def test_only_the_adapters_have_gradients(policy, pairs):
    _, grads = gradients(policy, [pairs])
    assert grads.keys() == adapters.adapter_weights(policy).keys()


class Recorded:
    """Stand-in for `mx` whose evaluations are recorded with the sums of their losses."""

    def __init__(self, events):
        self.events = events

    def __getattr__(self, name):
        if name not in {"eval", "async_eval"}:
            return getattr(mx, name)

        def evaluate(*trees):
            self.events.append(name)
            getattr(mx, name)(*trees)

        return evaluate


def test_the_next_graph_is_built_while_the_last_is_computed(policy, pairs, monkeypatch):
    """A graph is built before the wait for the pass before it, and computed only after it."""
    events = []
    monkeypatch.setattr(accumulate, "mx", Recorded(events))

    def scorer(model, batch):
        events.append("build")
        return plain_scorer(model, batch)

    batches = [micro([pair]) for pair in pairs[:3]]
    loss_and_gradients(policy, OBJECTIVE, batches, scorer=scorer)
    in_between = ["build", "eval", "async_eval"]
    assert events == ["build", "async_eval", *in_between, *in_between, "eval"]


def test_building_ahead_needs_the_memory_of_one_pass(pairs):
    """Four equal passes peak where two do; two passes at once would add half as much again."""
    policy = make_llama()
    adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1)
    long = replace(pairs[0], prompt=pairs[0].prompt * 40)

    def peak(count):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        loss_and_gradients(policy, OBJECTIVE, [micro([long])] * count)
        return mx.get_peak_memory() - before

    peak(2)
    assert peak(6) < 1.1 * peak(2)
