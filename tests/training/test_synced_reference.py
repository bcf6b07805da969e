"""A reference that follows the policy."""

from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan
from mlx_dpo.training.synced_reference import SyncedReference
from tests.conftest import make_llama


def score(model, pairs, **more):
    return score_pairs(model, pairs, limit=PassLimit(pairs=2), **more)


@pytest.fixture
def policy():
    model = make_llama()
    adapters.attach_adapters(model, rank=4, scale=2.0, seed=1)
    return model


def shifted(policy, by):
    for module in adapters.adapted_layers(policy).values():
        module.lora_b = module.lora_b + by


def test_it_takes_its_stride_when_the_steps_are_a_multiple(policy):
    """By hand: B is 0, then 0.25 * 1 + 0.75 * 0, then 0.25 * 3 + 0.75 * 0.25."""
    moving = SyncedReference(policy, alpha=0.25, every=2, score=score)
    name = next(name for name in moving.weights if name.endswith("lora_b"))
    found = []
    for step, by in ((1, 1.0), (2, 0.0), (3, 2.0), (4, 0.0)):
        shifted(policy, by)
        moving.follow(policy, step)
        found.append((moving.was_updated, moving.weights[name].flatten()[0].item()))
    assert found == [(False, 0.0), (True, 0.25), (True, 0.25), (True, 0.9375)]


def test_it_speaks_for_its_own_weights_and_leaves_the_policy_its_own(policy, pairs):
    moving = SyncedReference(policy, alpha=1.0, every=1, score=score)
    assert moving.logps(policy, pairs) is None
    shifted(policy, 0.01)
    moving.follow(policy, 1)
    then = score(policy, pairs)
    shifted(policy, 0.02)
    now = score(policy, pairs)
    logps = moving.logps(policy, pairs)
    assert mx.array_equal(logps.chosen, then.chosen) and mx.array_equal(
        logps.rejected, then.rejected
    )
    assert not mx.allclose(logps.chosen, now.chosen)
    assert mx.array_equal(score(policy, pairs).chosen, now.chosen)


def test_in_the_loop_rewards_are_zero_after_a_hard_update(policy, pairs):
    """With alpha 1 the reference is the policy: rewards begin at zero every second step."""
    moving = SyncedReference(policy, alpha=1.0, every=2, score=score)
    with adapters.disable_adapters(policy):
        reference = score(policy, pairs)
    plan = TrainingPlan(
        pairs=pairs, reference=reference, objective=Objective(LossSettings(beta=0.1)),
        learning_rate=lambda done: 1e-2, total_steps=5, batch_size=5, limit=PassLimit(pairs=2),
        max_grad_norm=1.0, seed=0, score=score,
    )  # fmt: skip
    fixed = adapters.adapter_weights(policy)
    synced = replace(plan, synced_reference=moving)
    rows = [m for _, m in train(policy, optim.AdamW(1e-2), synced, start=Progress())]
    rewards = [abs(row.preferences.margins) for row in rows]
    assert [reward < 1e-5 for reward in rewards] == [True, False, True, False, True]
    # The fixed reference sees the policy leave for good.
    policy.load_weights(list(fixed.items()), strict=False)
    rows = [m for _, m in train(policy, optim.AdamW(1e-2), plan, start=Progress())]
    assert [abs(row.preferences.margins) < 1e-5 for row in rows] == [True, *[False] * 4]


def test_it_goes_on_from_saved_weights(policy, pairs):
    moving = SyncedReference(policy, alpha=0.5, every=1, score=score)
    shifted(policy, 0.01)
    moving.follow(policy, 1)
    other = SyncedReference(policy, alpha=0.5, every=1, score=score)
    other.restore(dict(moving.weights))
    assert mx.array_equal(other.logps(policy, pairs).chosen, moving.logps(policy, pairs).chosen)
    assert named_arrays(policy.trainable_parameters()).keys() == other.weights.keys()
