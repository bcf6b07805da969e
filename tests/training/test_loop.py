import itertools
import math
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.micro_batches import micro_batches
from mlx_dpo.data.batches.token_counts import padded_row_tokens
from mlx_dpo.errors import TrainingError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.losses.metrics import to_public_names
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.scoring.scorers import TOKEN_COUNTS, make_shared_scorer, plain_scorer
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch, TrainingPlan
from mlx_dpo.training.step import loss_and_gradients
from mlx_dpo.types import PairLogps, TokenizedPair
from tests.conftest import VOCAB, make_llama


@pytest.fixture
def plan(tiny_llama, pairs):
    return TrainingPlan(
        pairs=pairs,
        reference=score_pairs(tiny_llama, pairs, limit=PassLimit(pairs=2)),
        objective=Objective(LossSettings(beta=0.1)),
        learning_rate=lambda done: 1e-2,
        total_steps=6,
        batch_size=2,
        limit=PassLimit(pairs=2),
        max_grad_norm=1.0,
        seed=0,
    )


def run(plan, *, start=Progress(), dropout=0.0):  # noqa: B008  (frozen)
    policy = make_llama()
    adapters.attach_adapters(policy, rank=4, scale=2.0, dropout=dropout, seed=1)
    optimizer = optim.AdamW(1e-2, weight_decay=0.0, bias_correction=True)
    return policy, list(train(policy, optimizer, plan, start=start))


def test_the_first_loss_is_log_two_and_all_rewards_are_zero(plan):
    _, [(progress, first), *_] = run(plan)
    assert progress.step == first.step == 1
    assert first.preferences.loss == pytest.approx(math.log(2), abs=1e-5)
    assert first.preferences.chosen_rewards == pytest.approx(0.0, abs=1e-5)
    assert first.preferences.rejected_rewards == pytest.approx(0.0, abs=1e-5)


def test_training_learns_the_preferences(plan):
    _, rows = run(replace(plan, total_steps=60))
    last = rows[-1][1].preferences
    assert last.loss < 0.35
    assert last.accuracies == 1.0
    assert last.margins > 1.0


def test_an_epoch_is_five_pairs_in_three_steps_and_tokens_are_counted(plan, pairs):
    _, rows = run(plan)
    assert [metrics.epoch for _, metrics in rows] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    assert rows[2][1].num_tokens == tokens
    assert rows[-1][0].num_tokens == 2 * tokens


def test_the_rate_of_each_step_is_that_of_the_updates_done_before(plan):
    """A rate of zero leaves the policy alone: the second step still begins at log 2."""
    plan = replace(plan, total_steps=3, learning_rate=lambda done: [0.0, 1e-2, 1e-2][done])
    _, rows = run(plan)
    losses = [metrics.preferences.loss for _, metrics in rows]
    assert losses[1] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses[2] - math.log(2)) > 1e-4
    assert [metrics.learning_rate for _, metrics in rows] == [0.0, 1e-2, 1e-2]


@pytest.mark.parametrize("pairs_per_pass", [1, 4])
def test_the_micro_batch_size_does_not_change_metrics(plan, pairs_per_pass):
    plan = replace(plan, batch_size=4)
    (_, rows), (_, others) = run(plan), run(replace(plan, limit=PassLimit(pairs=pairs_per_pass)))
    for (_, a), (_, b) in zip(rows, others, strict=True):
        # In the first step the policy is the reference, and rounding decides who is ahead.
        tied = {"accuracies": 0.0, "length_correlation": None} if a.step == 1 else {}
        known = b.preferences._replace(**tied)
        assert to_public_names(a.preferences._replace(**tied)) == pytest.approx(
            to_public_names(known), abs=1e-4
        )


SHARED = {
    packing: {
        "scorer": make_shared_scorer(vocab_size=VOCAB, gradients=True, packing=packing),
        "cost": TOKEN_COUNTS[packing],
    }
    for packing in TOKEN_COUNTS
}


@pytest.mark.parametrize("scored", [{}, *SHARED.values()], ids=["plain", *SHARED])
def test_no_micro_batch_limit_changes_the_step(plan, scored):
    """Descent at rate 1 moves each weight by its gradient.

    Rewards are away from 0, where an accuracy would be that of rounding noise.
    """
    moved = plan.reference.chosen + mx.array([1.0, -1.0, 2.0, -2.0, 3.0])
    plan = replace(plan, reference=plan.reference._replace(chosen=moved))

    def stepped(limit):
        policy = make_llama()
        adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1)
        changed = replace(
            plan, batch_size=5, total_steps=2, max_grad_norm=0.0, limit=limit, **scored
        )
        steps = train(
            policy,
            optim.SGD(1.0),
            replace(changed, learning_rate=lambda done: 1.0),
            start=Progress(),
        )
        rows = [to_public_names(metrics.preferences) for _, metrics in steps]
        return rows, adapters.adapter_weights(policy)

    rows, weights = stepped(PassLimit(pairs=1))
    for limit in (PassLimit(), PassLimit(tokens=30), PassLimit(3, 60), PassLimit(tokens=1)):
        others, moved = stepped(limit)
        for a, b in zip(rows, others, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
        for name, value in weights.items():
            assert mx.allclose(moved[name], value, atol=1e-5), (limit, name)


def test_no_cut_of_pairs_that_begin_alike_changes_the_gradients(plan):
    """Six pairs of four completions, and another prompt: the same step in one pass or in many."""
    answers = [(5, 6), (5, 7, 8), (9,), (5, 6, 7)]
    pairs = [TokenizedPair((1, 2, 3, 4), *two) for two in itertools.combinations(answers, 2)]
    pairs.append(TokenizedPair((1, 2, 9), (5, 6, 3), (4,)))
    logps = mx.linspace(-1.0, 1.0, len(pairs))
    plan = replace(plan, pairs=pairs, reference=PairLogps(logps, -logps), **SHARED["trie"])

    def gradients(limit):
        policy = make_llama()
        adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1)
        before = named_arrays(policy.trainable_parameters())
        changed = replace(plan, batch_size=7, total_steps=1, max_grad_norm=0.0, limit=limit)
        changed = replace(changed, learning_rate=lambda done: 1.0, group_by_prompt=True)
        list(train(policy, optim.SGD(1.0), changed, start=Progress()))
        after = named_arrays(policy.trainable_parameters())
        return mx.concatenate([(before[name] - after[name]).flatten() for name in before])

    expected = gradients(PassLimit(pairs=1))
    scale = expected.abs().max().item()
    assert scale > 1e-3
    for limit in (PassLimit(), PassLimit(pairs=2), PassLimit(pairs=4), PassLimit(tokens=12)):
        assert mx.abs(gradients(limit) - expected).max().item() < 1e-6 * max(1.0, scale)


def test_micro_batches_are_filled_by_the_token_count_of_the_scorer(plan):
    """Each prompt once, the five pairs take 5 + 4 + 8 tokens and 12 for the two whose prompts
    are equally long; as whole rows they take 70.
    """
    scorer, cost = SHARED["lengths"].values()
    for tokens, expected in ((29, [5]), (28, [4, 1])):
        held = []

        def counting(model, pairs, held=held):
            held.append(len(pairs))
            return scorer(model, pairs)

        limit = PassLimit(tokens=tokens)
        run(replace(plan, batch_size=5, total_steps=1, limit=limit, scorer=counting, cost=cost))
        assert held == expected


sizes = st.integers(1, 12)
some_pairs = st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=5)
limits = st.builds(PassLimit, st.none() | st.integers(1, 4), st.none() | st.integers(1, 90))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(some_pairs, limits, st.sampled_from([{}, *SHARED.values()]))
def test_no_micro_batch_limit_changes_the_gradient(lengths, limit, scored):
    ids = itertools.cycle(range(1, VOCAB))
    pairs = [TokenizedPair(*(tuple(itertools.islice(ids, n)) for n in ls)) for ls in lengths]
    policy = make_llama()
    reference = score_pairs(policy, pairs, limit=PassLimit(pairs=1))
    adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1)

    def gradient(limit, scorer=plain_scorer, cost=padded_row_tokens):
        groups = micro_batches(range(len(pairs)), pairs, limit, cost=cost)
        micros = [
            MicroBatch.of([pairs[i] for i in group], reference.take(group)) for group in groups
        ]
        _, found = loss_and_gradients(
            policy, Objective(LossSettings(beta=0.1)), micros, scorer=scorer
        )
        return named_arrays(found)

    found, expected = gradient(limit, **scored), gradient(PassLimit(pairs=1))
    for name, value in expected.items():
        assert mx.allclose(found[name], value, atol=1e-5), name


def test_the_share_of_padding_is_that_of_the_step(plan, pairs):
    """Whole rows of 8, of which 7 go through: 10 of them, for rows of 4 + 3 + 4 + 2 and so on."""
    [(_, metrics)] = run(replace(plan, batch_size=5, total_steps=1))[1]
    real = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs)
    assert real == 33
    assert metrics.padding_share == pytest.approx((70 - 33) / 70)
    alone = replace(
        plan, batch_size=5, total_steps=1, limit=PassLimit(pairs=1), **SHARED["lengths"]
    )
    [(_, metrics)] = run(alone)[1]
    # Continuations of one token are padded to two, five times; prompts have 11, the rest 11.
    assert metrics.padding_share == pytest.approx(4 / 26)


def test_each_pair_meets_its_own_reference(plan):
    """A reference that is off by a different amount for each pair shows as those rewards."""
    shift = mx.array([10.0 * (i + 1) for i in range(5)])
    moved = plan.reference._replace(chosen=plan.reference.chosen - shift)
    _, rows = run(replace(plan, reference=moved, total_steps=3, learning_rate=lambda done: 0.0))
    weighted = sum(
        m.preferences.chosen_rewards * n for (_, m), n in zip(rows, (2, 2, 1), strict=True)
    )
    assert weighted == pytest.approx(0.1 * shift.sum().item(), abs=1e-4)
    assert {round(m.preferences.chosen_rewards, 3) for _, m in rows} != {3.0}


def test_dropout_acts_in_training_even_after_an_evaluation(plan):
    """Evaluation switches the policy to its evaluation mode; the next step switches back."""
    policy = make_llama()
    adapters.attach_adapters(policy, rank=4, scale=2.0, dropout=0.5, seed=1)
    optimizer = optim.AdamW(1e-2, bias_correction=True)
    modes = []
    for _ in train(policy, optimizer, replace(plan, total_steps=3), start=Progress()):
        modes.append(policy.training)
        policy.eval()
    assert modes == [True, True, True]


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_pairs(plan):
    broken = plan.reference._replace(
        chosen=mx.where(mx.arange(5) == 2, float("nan"), plan.reference.chosen)
    )
    policy = make_llama()
    adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1)
    optimizer = optim.AdamW(1e-2, bias_correction=True)
    steps = train(policy, optimizer, replace(plan, reference=broken), start=Progress())
    done, before = 0, adapters.adapter_weights(policy)
    with pytest.raises(TrainingError) as error:
        for progress, _ in steps:
            done, before = progress.step, adapters.adapter_weights(policy)
    assert str(error.value).startswith(f"step {done + 1}: the loss is not a finite number at a:3; ")
    for name, value in adapters.adapter_weights(policy).items():
        assert mx.array_equal(value, before[name]), name
