"""Optimizer steps of some losses beside TRL's, as `test_trl_agreement.py` has them for `sigmoid`.

TRL's values come from `scripts/tools/goldens/trl_losses.py`.
"""

import json
from functools import partial

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_pair
from mlx_dpo.losses.metrics import step_row
from mlx_dpo.optim.lr_schedule import learning_rate
from mlx_dpo.schemas import parse_pairs
from mlx_dpo.schemas.schema import Row
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.scoring.scorers import TOKEN_COUNTS, make_shared_scorer
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan
from mlx_dpo.types import PairLogps
from scripts.tools.goldens import trl_losses as trl
from scripts.tools.goldens import trl_sigmoid as sigmoid
from tests.training.test_trl_agreement import SEED, fresh_base, order_of, set_initial_a

LARGEST, MEAN = 1e-4, 1e-5  # of rewards, and of losses around 1; a shift shows in the mean


@pytest.fixture(scope="module")
def golden():
    """Made from the same model and pairs as the other one, which says if they have changed."""
    runs = json.loads(trl.RUNS_GOLDEN.read_text())["runs"]
    assert {name: run["settings"] for name, run in runs.items()} == trl.STEPS
    return runs


@pytest.fixture(scope="module")
def pairs():
    base = fresh_base()
    rules = TokenRules(vocab_size=base.vocab_size)
    count = sigmoid.BATCH * max(run["steps"] for run in trl.STEPS.values())
    rows = [Row(json.loads(line), "") for line in sigmoid.first_lines(count)]
    return [tokenize_pair(base.tokenizer, parse_pairs(row)[0], rules).pair for row in rows]


@pytest.fixture(scope="module")
def reference(pairs):
    base = fresh_base()
    scorer = make_shared_scorer(vocab_size=base.vocab_size, gradients=False, packing="row")
    limit = PassLimit(pairs=16)
    return score_pairs(base.model, pairs, limit=limit, scorer=scorer, cost=TOKEN_COUNTS["row"])


@pytest.fixture(scope="module", params=trl.STEPS)
def comparison(request, golden, pairs, reference):
    settings = trl.STEPS[request.param]
    config = DPOConfig(beta=settings["beta"], **settings["loss"])
    base = fresh_base()
    policy = base.model
    adapters.attach_adapters(policy, rank=settings["lora_r"], scale=settings["lora_alpha"] / 16)
    set_initial_a(policy, json.loads(sigmoid.GOLDEN.read_text()))
    order = order_of(len(pairs))
    plan = TrainingPlan(
        pairs=[pairs[row] for row in order],
        reference=PairLogps(*(logps[mx.array(order)] for logps in reference)),
        objective=Objective(config),
        learning_rate=partial(
            learning_rate,
            peak=settings["learning_rate"],
            total=settings["steps"],
            warmup=round(settings["warmup_ratio"] * settings["steps"]),
            schedule=settings["lr_scheduler_type"],
        ),
        total_steps=settings["steps"],
        batch_size=sigmoid.BATCH,
        limit=PassLimit(pairs=8),
        scorer=make_shared_scorer(vocab_size=base.vocab_size, gradients=True, packing="row"),
        cost=TOKEN_COUNTS["row"],
        max_grad_norm=settings["max_grad_norm"],
        seed=SEED,
    )
    optimizer = optim.AdamW(settings["learning_rate"], weight_decay=0.0, bias_correction=True)
    steps = [step_row(m) for _, m in train(policy, optimizer, plan, start=Progress())]
    return steps, golden[request.param]["steps"]


@pytest.mark.parametrize(
    "name",
    ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm", "logps/chosen"],
)
def test_every_step_is_that_of_trl(comparison, name):
    ours, theirs = (np.array([step[name] for step in side]) for side in comparison)
    scale = max(1.0, np.abs(theirs).max())
    largest, mean = np.abs(ours - theirs).max() / scale, (ours - theirs).mean() / scale
    print(f"{name}: largest difference {largest:.1e}, mean {mean:+.1e} of {scale:.3g}")
    assert largest < LARGEST
    assert abs(mean) < MEAN


def test_the_policy_moved_far_beyond_the_tolerance(comparison):
    _, theirs = comparison
    assert max(abs(step["rewards/margins"]) for step in theirs) > 300 * LARGEST
