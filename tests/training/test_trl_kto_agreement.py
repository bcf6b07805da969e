"""Twenty steps of KTO against TRL's, value by value."""

import json
from dataclasses import replace

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_unpaired
from mlx_dpo.losses.metrics import step_row
from mlx_dpo.models.load import load_model
from mlx_dpo.schemas import parse_unpaired
from mlx_dpo.schemas.schema import Row, RowRules
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan
from scripts.tools.goldens import trl_kto as kto
from scripts.tools.goldens import trl_sigmoid as trl

SEED = 3


@pytest.fixture(scope="module")
def golden():
    golden = json.loads(kto.GOLDEN.read_text())
    found = {path.name: trl.sha256(path.read_bytes()) for path in trl.SOURCES}
    assert golden["sources"] == found, f"run {golden['made_by']} again"
    assert golden["settings"] == kto.SETTINGS
    return golden


@pytest.fixture(scope="module")
def rows(golden):
    """As TRL completes them: with the answer before, turned round within each step."""
    base = load_model(str(trl.MODEL), dtype="float32")
    rules = TokenRules(vocab_size=base.vocab_size)
    rows = []
    for record in kto.judged(trl.first_lines(golden["pairs"]["count"])):
        row = Row(record, "")
        [judgement] = parse_unpaired(row, RowRules(judged=True))
        rows.append(tokenize_unpaired(base.tokenizer, judgement, rules).pair)
    steps = [rows[start : start + trl.BATCH] for start in range(0, len(rows), trl.BATCH)]
    return [
        replace(row, rejected=step[place - 1].chosen)
        for step in steps
        for place, row in enumerate(step)
    ]


@pytest.fixture(scope="module")
def reference(rows):
    policy = load_model(str(trl.MODEL), dtype="float32").model
    return score_pairs(policy, rows, limit=PassLimit(pairs=16))


@pytest.fixture(scope="module", params=[16, 6], ids=["a step a pass", "six rows a pass"])
def comparison(request, golden, rows, reference):
    settings = golden["settings"]
    policy = load_model(str(trl.MODEL), dtype="float32").model
    scale = settings["lora_alpha"] / settings["lora_r"]
    adapters.attach_adapters(policy, rank=settings["lora_r"], scale=scale)
    modules = adapters.adapted_layers(policy)
    for name, factor in trl.initial_a(golden["adapted"], rank=settings["lora_r"]).items():
        modules[name].lora_a = mx.array(factor.T)
    taken = [
        PairOrder(count=len(rows), batch_size=trl.BATCH, seed=SEED).step(k)
        for k in range(settings["steps"])
    ]
    order = np.argsort([place for step in taken for place in step]).tolist()
    config = DPOConfig(
        loss_type=("kto",),
        beta=settings["beta"],
        desirable_weight=settings["desirable_weight"],
        undesirable_weight=settings["undesirable_weight"],
    )

    def score(model, pairs, **more):
        return score_pairs(model, pairs, limit=PassLimit(pairs=16), **more)

    count = settings["steps"] if request.param == trl.BATCH else 6
    plan = TrainingPlan(
        pairs=[rows[i] for i in order], reference=reference.take(order),
        objective=Objective(config), learning_rate=lambda done: settings["learning_rate"],
        total_steps=count, batch_size=trl.BATCH, limit=PassLimit(pairs=request.param),
        max_grad_norm=1.0, seed=SEED, score=score,
    )  # fmt: skip
    optimizer = optim.AdamW(1.0, weight_decay=0.0, bias_correction=True)
    ours = [step_row(m) for _, m in train(policy, optimizer, plan, start=Progress())]
    return ours, golden["steps"][:count]


@pytest.mark.parametrize("name", kto.METRICS)
def test_every_step_is_that_of_trl(comparison, name):
    ours, theirs = ([row[name] for row in rows] for rows in comparison)
    # A KL in nats of whole answers, and a norm, are sums of larger numbers.
    assert ours == pytest.approx(theirs, abs=1e-3 if name in ("kl", "grad_norm") else 1e-4)


def test_the_golden_values_can_reveal_an_error(golden):
    """The KL is above its bound of 0 at times and at it at others, and rewards grow."""
    kls = [step["kl"] for step in golden["steps"]]
    assert max(kls) > 0.05 and min(kls) == 0
    assert max(abs(step["rewards/margins"]) for step in golden["steps"]) > 1
