"""Losses that couple the pairs of a step, which go through the model a few at a time."""

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.metadata import pair_metadata
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.losses.log_ratios import log_ratios
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training.grad_cache import GradCache, only_kl_completions, skip_kl_completions
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan
from mlx_dpo.types import PairLogps, ScoredPairs
from tests.conftest import make_llama

LIMIT = PassLimit(pairs=2)


@dataclass(frozen=True, kw_only=True)
class Products(Objective):
    """Each pair's loss is its own chosen log-ratio times that of the next pair of the step."""

    uses_whole_batch = True

    def compute_losses(self, scored, ratios):
        return ratios.chosen * mx.roll(ratios.chosen, -1)


@dataclass(frozen=True, kw_only=True)
class Judged(Objective):
    """A labelled loss: the log-ratio beyond the mean one of the mismatched completions."""

    uses_whole_batch = True
    labelled = True

    def compute_losses(self, scored, ratios):
        point = mx.stop_gradient(ratios.rejected.mean())
        return mx.where(scored.metadata.desirable, -1.0, 1.0) * (ratios.chosen - point) ** 3


def stepped(pairs, objective, limit, scored=None):
    """Descent at rate 1 moves each weight by its gradient."""
    policy = make_llama()
    adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1)
    mx.random.seed(3)
    for module in adapters.adapted_layers(policy).values():
        module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)

    def score(model, pairs, **more):
        logps = score_pairs(model, pairs, limit=LIMIT, **more)
        if scored is not None:
            scored.append((pairs, logps))
        return logps

    with adapters.disable_adapters(policy):
        reference = score_pairs(policy, pairs, limit=LIMIT)
    plan = TrainingPlan(
        pairs=pairs, reference=reference, objective=objective, learning_rate=lambda done: 0.01,
        total_steps=1, batch_size=len(pairs), limit=limit, max_grad_norm=0.0, seed=0, score=score,
    )  # fmt: skip
    before = named_arrays(policy.trainable_parameters())
    [(_, metrics)] = train(policy, optim.SGD(0.01), plan, start=Progress())
    after = named_arrays(policy.trainable_parameters())
    return metrics, {name: before[name] - after[name] for name in before}


def labelled(pairs):
    return [replace(pair, desirable=bool(i % 2)) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "objective", [Products(LossSettings()), Judged(LossSettings())], ids=["coupled", "labelled"]
)
def test_a_step_is_independent_of_its_micro_batches(pairs, objective, size):
    """Pairs of one pass coupled among themselves alone would give another gradient."""
    rows = labelled(pairs) if objective.labelled else pairs
    whole, gradient = stepped(rows, objective, PassLimit())
    cut, pieces = stepped(rows, objective, PassLimit(pairs=size))
    assert cut.preferences.loss == pytest.approx(whole.preferences.loss, rel=1e-4)
    assert cut.preferences.accuracies == whole.preferences.accuracies
    for name, value in gradient.items():
        assert mx.allclose(pieces[name], value, rtol=1e-3, atol=1e-6), name


def test_no_gradient_flows_through_the_mismatched_completion(pairs):
    """It is asked ahead in full; the pass with gradients has one token of it."""
    rows, requested = labelled(pairs), []
    metrics, _ = stepped(rows, Judged(LossSettings()), PassLimit(), requested)
    [(ahead, logps)] = requested
    assert sorted(len(pair.rejected) for pair in ahead) == sorted(len(p.rejected) for p in rows)
    assert {len(pair.chosen) for pair in ahead} == {1}
    assert {len(pair.rejected) for pair in skip_kl_completions(rows)} == {1}
    assert [p.chosen for p in skip_kl_completions(rows)] == [p.chosen for p in rows]
    assert [p.rejected for p in only_kl_completions(rows)] == [p.rejected for p in rows]
    # What is said of the step is what was scored ahead, not the one token.
    policy = make_llama()
    reference = score_pairs(policy, ahead, limit=LIMIT)
    kl = (logps.rejected - reference.rejected).mean().item()
    assert metrics.preferences.kl == pytest.approx(max(0.0, kl), abs=1e-4)


def test_a_pair_keeps_its_place_in_the_step(pairs):
    numbers = mx.arange(5.0)
    whole = ScoredPairs(
        PairLogps(numbers, 10 + numbers), PairLogps(numbers, numbers), pair_metadata(pairs), numbers
    )
    cache = GradCache.of(whole, [3, 0])
    live = cache.with_gradients(PairLogps(mx.array([33.0, 30.0]), mx.array([43.0, 40.0])))
    assert live.policy.chosen.tolist() == [30.0, 1.0, 2.0, 33.0, 4.0]
    assert live.policy.rejected.tolist() == [40.0, 11.0, 12.0, 43.0, 14.0]
    ratios = log_ratios(live.policy, live.reference)
    own = cache.select(Objective(LossSettings(beta=1.0)).compute_outputs(live, ratios))
    assert own.scored.policy.chosen.tolist() == [33.0, 30.0]
    assert own.chosen_rewards.tolist() == [30.0, 30.0]
    assert own.scored.on_policy_weights.tolist() == [3.0, 0.0]
    assert own.scored.metadata.mean_chosen_tokens.ndim == 0
