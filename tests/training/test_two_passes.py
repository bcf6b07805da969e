"""Two passes at once against one after the other: the same bits, the same errors."""

import multiprocessing
import os
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.errors import TrainingError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.optim.optimizers import build_optimizer
from mlx_dpo.scoring.score_pairs import Processes, score_pairs
from mlx_dpo.scoring.scorers import TOKEN_COUNTS, make_shared_scorer, plain_scorer
from mlx_dpo.startup import openblas
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan
from mlx_dpo.types import PairLogps, TokenizedPair
from tests.conftest import VOCAB, make_llama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")

DRAW = np.random.default_rng(0)


def ids(count):
    return tuple(DRAW.integers(1, VOCAB, count).tolist())


PAIRS = [
    TokenizedPair(ids(4 + i), ids(3 + i % 4), ids(2 + i % 3), location=f"pairs:{i}")
    for i in range(14)
]
REFERENCE = PairLogps(mx.full((14,), -20.0), mx.full((14,), -18.0))
SHARED = make_shared_scorer(vocab_size=VOCAB, gradients=True, packing="row")


def make_plan(**changes):
    plan = TrainingPlan(
        pairs=PAIRS,
        reference=REFERENCE,
        objective=Objective(LossSettings(beta=0.1)),
        learning_rate=lambda done: 1e-2,
        total_steps=3,
        batch_size=6,  # the third step has one micro-batch, the others have three
        limit=PassLimit(pairs=2),
        max_grad_norm=0.5,
        seed=0,
        scorer=SHARED,
        cost=TOKEN_COUNTS["row"],
    )
    return replace(plan, **changes)


def outcome(plan):
    """Return all weights, the optimizer's state and the metrics at the end of training."""
    policy = make_llama()
    adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1)
    optimizer = build_optimizer("adamw", policy, 1e-2)
    rows = [metrics for _, metrics in train(policy, optimizer, plan, start=Progress())]
    arrays = named_arrays(policy.parameters()) | named_arrays(optimizer.state)
    return {name: np.array(value).tobytes() for name, value in arrays.items()}, rows


def score_reference(model, pairs, **options):
    return score_pairs(model, pairs, limit=PassLimit(pairs=2), **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recompute": True},
        {"limit": PassLimit(pairs=1)},
        {"objective": Objective(LossSettings(loss_type=("bco_pair",))), "score": score_reference},
    ],
    ids=["kept", "recomputed", "six passes", "whole batch"],
)
def test_two_passes_at_once_train_the_same_bits(changes):
    plan = make_plan(**changes)
    expected = outcome(plan)
    assert outcome(replace(plan, passes_at_once=2)) == expected
    assert outcome(replace(plan, passes_at_once=2)) == expected


def test_every_other_pass_is_computed_by_the_second_process():
    """Also those of the step in which it begins, and none of the others."""
    processes = []

    def scorer(model, pairs):
        processes.append(os.getpid())
        return plain_scorer(model, pairs)

    outcome(make_plan(scorer=scorer, passes_at_once=2, total_steps=2, limit=PassLimit(pairs=1)))
    assert processes == [os.getpid()] * 6  # three of six passes in each of two steps


def fails_elsewhere(model, pairs):
    if os.getpid() != FIRST:
        raise TrainingError(f"{pairs[0].location}: broken")
    return plain_scorer(model, pairs)


FIRST = os.getpid()


def test_an_error_of_the_second_process_ends_the_training_here():
    with pytest.raises(TrainingError, match=r"^pairs:\d+: broken$"):
        outcome(make_plan(scorer=fails_elsewhere, passes_at_once=2))


def infinite_elsewhere(model, pairs):
    logps = plain_scorer(model, pairs)
    return logps if os.getpid() == FIRST else PairLogps(logps.chosen * mx.inf, logps.rejected)


def test_a_loss_of_the_second_process_that_is_not_finite_names_its_pairs():
    plan = make_plan(scorer=infinite_elsewhere, passes_at_once=2, limit=PassLimit(pairs=1))
    second = [PAIRS[group[0]].location for group in plan.groups(plan.indices(1))[1::2]]
    with pytest.raises(TrainingError, match="the loss is not a finite number at ") as caught:
        outcome(plan)
    assert all(location in str(caught.value) for location in second)


@pytest.mark.parametrize("size", [1, 2], ids=["14 passes", "7 passes"])
def test_scores_of_two_passes_at_once_are_the_same_bits(size):
    scored = []
    model = make_llama()
    options = {"limit": PassLimit(pairs=size), "scorer": SHARED, "cost": TOKEN_COUNTS["row"]}
    expected = score_pairs(model, PAIRS, **options)
    found = score_pairs(model, PAIRS, **options, processes=Processes(2), progress=scored.append)
    assert mx.array_equal(found.chosen, expected.chosen)
    assert mx.array_equal(found.rejected, expected.rejected)
    assert scored == [size] * (14 // size)


def test_an_error_of_the_second_process_ends_the_scoring_here():
    with pytest.raises(TrainingError, match=r"^pairs:\d+: broken$"):
        score_pairs(
            make_llama(),
            PAIRS,
            limit=PassLimit(pairs=1),
            scorer=fails_elsewhere,
            processes=Processes(2),
        )


def test_an_error_here_ends_the_second_process_and_gives_the_threads_back(monkeypatch):
    """Although the error keeps the frames of its traceback, as in a notebook."""
    threads = [4]
    monkeypatch.setattr(openblas, "num_threads", lambda: threads[0])
    monkeypatch.setattr(openblas, "set_num_threads", lambda count: threads.__setitem__(0, count))
    with pytest.raises(TrainingError, match="a completion has log-probability inf") as kept:
        score_pairs(
            make_llama(),
            PAIRS,
            limit=PassLimit(pairs=1),
            scorer=infinite_here,
            processes=Processes(2),
        )
    assert kept.tb is not None
    assert threads == [4]
    assert multiprocessing.active_children() == []


def infinite_here(model, pairs):
    logps = plain_scorer(model, pairs)
    return logps if os.getpid() != FIRST else PairLogps(logps.chosen * -mx.inf, logps.rejected)
