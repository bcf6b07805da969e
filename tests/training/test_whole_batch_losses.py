"""Losses of whole batches through micro-batches: the gradient equals that of one pass."""

from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.losses.catalogue import LOSSES
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan, make_micro_batches
from mlx_dpo.training.step import loss_and_gradients
from mlx_dpo.types import RankedPair
from tests.conftest import make_llama

LIMIT = PassLimit(pairs=2)
SUMS = [
    ("aot",), ("aot_unpaired",), ("kto",), ("aot", "sft"), ("cpo",), ("orpo",),
    ("plackett_luce",), ("lipo_lambda",), ("plackett_luce", "sft"),
]  # fmt: skip
# Pairs of a list of three completions and of one of two, in an order that micro-batches cut.
PLACES = ((1, 0, 1), (2, 0, 1), (1, 0, 2), (3, 1, 0), (1, 1, 2))


def ranked(pairs):
    return [
        replace(pair, ranking=RankedPair(number, i, j, 3.0 - i, 3.0 - j, 2.0, 3))
        for pair, (number, i, j) in zip(pairs, PLACES, strict=True)
    ]


def stepped(pairs, loss_type, limit):
    """Return metrics and gradient of one step: SGD changes each weight by the gradient."""
    objective = Objective(LossSettings(loss_type=loss_type, beta=0.5))
    policy = make_llama()
    adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1)
    mx.random.seed(3)
    for module in adapters.adapted_layers(policy).values():
        module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)
    if objective.labelled:
        pairs = [replace(pair, desirable=bool(i % 2)) for i, pair in enumerate(pairs)]
    if objective.settings.listwise:
        pairs = ranked(pairs)

    def score(model, pairs, **more):
        return score_pairs(model, pairs, limit=LIMIT, **more)

    with adapters.disable_adapters(policy):
        reference = score(policy, pairs)
    plan = TrainingPlan(
        pairs=pairs, reference=reference, objective=objective, learning_rate=lambda done: 0.01,
        total_steps=1, batch_size=len(pairs), limit=limit, max_grad_norm=0.0, seed=0, score=score,
    )  # fmt: skip
    before = named_arrays(policy.trainable_parameters())
    [(_, metrics)] = train(policy, optim.SGD(0.01), plan, start=Progress())
    after = named_arrays(policy.trainable_parameters())
    return metrics.preferences, {n: (before[n] - after[n]) / 0.01 for n in before}


def test_every_whole_batch_loss_is_tested():
    assert {kind.name for kind in LOSSES.values() if kind.uses_whole_batch} <= {s[0] for s in SUMS}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("loss_type", SUMS, ids="+".join)
def test_a_step_is_independent_of_its_micro_batches(pairs, loss_type, size):
    """Sorted within a pass, or divided by its own mean length, it would be another loss."""
    whole, gradient = stepped(pairs, loss_type, PassLimit())
    cut, pieces = stepped(pairs, loss_type, PassLimit(pairs=size))
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    largest = max(mx.abs(value).max().item() for value in gradient.values())
    assert largest > 1e-2
    for name, value in gradient.items():
        assert mx.abs(pieces[name] - value).max().item() <= 1e-4 * largest, name


@pytest.mark.parametrize("loss_type", [("plackett_luce",), ("lipo_lambda", "sft"), ("aot",)])
def test_only_micro_batches_that_cut_a_list_need_another_pass(pairs, loss_type):
    """The losses of a list depend on its own pairs; those of `aot` on all pairs of the step."""
    scored = []

    def score(model, pairs, **more):
        scored.append(len(pairs))
        return score_pairs(model, pairs, limit=LIMIT, **more)

    policy, objective = make_llama(), Objective(LossSettings(loss_type=loss_type, beta=0.5))
    adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1)
    mx.random.seed(3)
    for module in adapters.adapted_layers(policy).values():
        module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)
    with adapters.disable_adapters(policy):
        reference = score_pairs(policy, pairs, limit=LIMIT)
    plan = TrainingPlan(
        pairs=ranked(pairs), reference=reference, objective=objective,
        learning_rate=lambda done: 0.01, total_steps=1, batch_size=5, limit=LIMIT,
        max_grad_norm=0.0, seed=0, score=score,
    )  # fmt: skip
    cuts = {
        "whole lists": [[4, 0, 2], [1, 3]],
        "a list in two": [[0, 2], [1, 4, 3]],
        "one pass": [[0, 1, 2, 3, 4]],
    }
    passes, found = {}, {}
    for name, groups in cuts.items():
        scored.clear()
        batches = make_micro_batches(policy, plan, range(5), groups, step=1)
        passes[name] = list(scored)
        outputs, gradient = loss_and_gradients(policy, objective, batches)
        found[name] = outputs.losses.sum().item(), named_arrays(gradient)
    assert passes["a list in two"] == [5]
    assert passes["whole lists"] == passes["one pass"] == ([5] if loss_type == ("aot",) else [])
    total, expected = found["one pass"]
    largest = max(mx.abs(value).max().item() for value in expected.values())
    for name in ("whole lists", "a list in two"):
        value, gradient = found[name]
        assert value == pytest.approx(total, rel=1e-5)
        for key, whole in expected.items():
            assert mx.abs(gradient[key] - whole).max().item() <= 1e-5 * largest, (name, key)
