"""Optimizer steps beside TRL's: the same weights, adapters, pairs and order, in float32.

TRL's values come from `scripts/tools/goldens/trl_sigmoid.py`, which says what it
needs to make them again.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_pair
from mlx_dpo.losses.metrics import step_row
from mlx_dpo.models.load import LoadedModel, load_model
from mlx_dpo.optim.lr_schedule import learning_rate
from mlx_dpo.schemas import parse_pairs
from mlx_dpo.schemas.schema import Row
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan
from mlx_dpo.types import PairLogps, TokenizedPair
from scripts.tools.goldens import trl_sigmoid as trl

SEED = 7  # of our order of the pairs, which is undone here: TRL takes them as they stand
LARGEST, MEAN = 1e-4, 1e-5  # of loss and rewards; a shift to one side shows in the mean
STEPS = Sequence[dict[str, float]]


class Comparison(NamedTuple):
    """The same optimizer steps by mlx-dpo and by TRL."""

    ours: STEPS
    theirs: STEPS

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A metric at every step, ours and TRL's. (steps,) each"""
        ours, theirs = (np.array([step[name] for step in side]) for side in self)
        return ours, theirs


# --- what is compared ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    golden = json.loads(trl.GOLDEN.read_text())
    found = {path.name: trl.sha256(path.read_bytes()) for path in trl.SOURCES}
    found["pairs"] = trl.sha256("\n".join(trl.first_lines(golden["pairs"]["count"])).encode())
    made_from = golden["sources"] | {"pairs": golden["pairs"]["sha256"]}
    stale = sorted(name for name in made_from if made_from[name] != found[name])
    if stale:
        pytest.fail(
            f"{trl.GOLDEN.name}: models/tiny-chat has changed since ({', '.join(stale)}); "
            f"run {golden['made_by']} again"
        )
    return golden


def fresh_base() -> LoadedModel:
    return load_model(str(trl.MODEL), dtype="float32")


@pytest.fixture(scope="module")
def pairs(golden: dict[str, Any]) -> list[TokenizedPair]:
    base = fresh_base()
    rules = TokenRules(vocab_size=base.vocab_size)
    rows = [Row(json.loads(line), "") for line in trl.first_lines(golden["pairs"]["count"])]
    return [tokenize_pair(base.tokenizer, parse_pairs(row)[0], rules).pair for row in rows]


@pytest.fixture(scope="module")
def reference(pairs: list[TokenizedPair]) -> PairLogps:
    return score_pairs(fresh_base().model, pairs, limit=PassLimit(pairs=16))


def order_of(count: int) -> list[int]:
    """Where a pair has to lie so that the steps meet the pairs as they stand in the file."""
    steps = range(count // trl.BATCH)
    taken = [PairOrder(count=count, batch_size=trl.BATCH, seed=SEED).step(k) for k in steps]
    return np.argsort([place for step in taken for place in step]).tolist()


def set_initial_a(policy: nn.Module, golden: dict[str, Any]) -> None:
    modules = adapters.adapted_layers(policy)
    assert {name: module.lora_a.shape[0] for name, module in modules.items()} == golden["adapted"]
    [rank] = {module.lora_a.shape[1] for module in modules.values()}
    for name, factor in trl.initial_a(golden["adapted"], rank=rank).items():
        modules[name].lora_a = mx.array(factor.T)


def through_the_loop(
    golden: dict[str, Any], pairs: list[TokenizedPair], reference: PairLogps, size: int
) -> Iterator[dict[str, float]]:
    """The plain run by hand, every value from the golden file."""
    settings = golden["runs"]["plain"]["settings"]
    policy = fresh_base().model
    adapters.attach_adapters(
        policy,
        rank=settings["lora_r"],
        scale=settings["lora_alpha"] / settings["lora_r"],
    )
    set_initial_a(policy, golden)
    order = order_of(len(pairs))
    plan = TrainingPlan(
        pairs=[pairs[row] for row in order],
        reference=PairLogps(*(logps[mx.array(order)] for logps in reference)),
        objective=Objective(LossSettings(beta=settings["beta"])),
        learning_rate=partial(
            learning_rate,
            peak=settings["learning_rate"],
            total=settings["steps"],
            warmup=math.ceil(settings["warmup_ratio"] * settings["steps"]),
            schedule=settings["lr_scheduler_type"],
        ),
        total_steps=settings["steps"],
        batch_size=trl.BATCH,
        limit=PassLimit(pairs=size),
        max_grad_norm=settings["max_grad_norm"],
        seed=SEED,
    )
    optimizer = optim.AdamW(
        settings["learning_rate"], weight_decay=settings["weight_decay"], bias_correction=True
    )
    for _, metrics in train(policy, optimizer, plan, start=Progress()):
        yield step_row(metrics)


def through_a_run(golden: dict[str, Any], folder: Path) -> Iterator[dict[str, float]]:
    """The varied run as a user starts it: a file of pairs and settings."""
    settings = dict(golden["runs"]["varied"]["settings"])
    lines = trl.first_lines(trl.BATCH * settings.pop("steps"))
    held_out = folder / "valid.jsonl"
    held_out.write_text(lines[0] + "\n", encoding="utf-8")
    file = folder / "pairs.jsonl"
    file.write_text("".join(lines[row] + "\n" for row in order_of(len(lines))), encoding="utf-8")
    config = DPOConfig(
        model=str(trl.MODEL),
        pairs=str(file),
        output=str(folder / "run"),
        valid=str(held_out),
        dtype="float32",
        batch_size=trl.BATCH,
        micro_batch_size=5,
        seed=SEED,
        **settings,
    )
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        set_initial_a(trainer.policy, golden)
        yield from (row for row in trainer.steps() if "loss" in row)


@pytest.fixture(scope="module", params=["four pairs a pass", "six pairs a pass", "a whole run"])
def comparison(request, golden, pairs, reference, tmp_path_factory) -> Iterator[Comparison]:
    plain, varied = (golden["runs"][name]["steps"] for name in ("plain", "varied"))
    if request.param == "four pairs a pass":
        yield Comparison(list(through_the_loop(golden, pairs, reference, 4)), plain)
    elif request.param == "six pairs a pass":  # 6, 6 and 4: their means would not add up
        some = through_the_loop(golden, pairs, reference, 6)
        yield Comparison(list(islice(some, 5)), plain[:5])
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLX_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
            yield Comparison(list(through_a_run(golden, tmp_path_factory.mktemp("run"))), varied)


# --- before the first step -----------------------------------------------------------------


def test_the_golden_values_are_those_of_the_script_as_it_is(golden):
    assert {name: run["settings"] for name, run in golden["runs"].items()} == trl.RUNS


def test_the_golden_values_can_reveal_an_error(golden):
    """Rewards grow far beyond the tolerance, and of the gradients some are clipped."""
    for run in golden["runs"].values():
        assert max(abs(step["rewards/margins"]) for step in run["steps"]) > 300 * LARGEST
    varied = golden["runs"]["varied"]
    clipped = [s["grad_norm"] > varied["settings"]["max_grad_norm"] for s in varied["steps"]]
    assert {True, False} == set(clipped)


def test_chat_pairs_become_the_tokens_that_trl_makes_of_them(golden, pairs):
    made = [(list(pair.prompt), list(pair.chosen), list(pair.rejected)) for pair in pairs]
    first = [tuple(ids) for ids in golden["tokens"]["first"]]
    assert made[: len(first)] == first
    assert trl.tokens_digest(made) == golden["tokens"]["sha256"]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_reference_says_of_each_pair_what_trls_adapter_off_base_says(golden, reference, side):
    ours, theirs = getattr(reference, side), golden["reference_logps"][side]
    assert ours[: trl.BATCH].tolist() == pytest.approx(theirs, abs=1e-3)


# --- the steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins"])
def test_loss_and_rewards_are_those_of_trl_at_every_step(comparison, name):
    ours, theirs = comparison.values(name)
    largest, mean = np.abs(ours - theirs).max(), (ours - theirs).mean()
    print(f"{name}: largest difference {largest:.1e}, mean {mean:+.1e} over {len(ours)} steps")
    assert largest < LARGEST
    assert abs(mean) < MEAN


@pytest.mark.parametrize("name", ["logps/chosen", "logps/rejected"])
def test_log_probabilities_are_those_of_trl_at_every_step(comparison, name):
    ours, theirs = comparison.values(name)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_accuracies_are_those_of_trl_at_every_step(comparison):
    ours, theirs = comparison.values("rewards/accuracies")
    # The first update has a rate of 0: before the second, only rounding tells pairs apart.
    assert ours[2:] == pytest.approx(theirs[2:], abs=1e-6)


def test_the_gradient_before_clipping_is_as_long_as_that_of_trl(comparison):
    ours, theirs = comparison.values("grad_norm")
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("name", ["learning_rate", "epoch", "num_tokens"])
def test_rates_and_counts_are_those_of_trl(comparison, name):
    ours, theirs = comparison.values(name)
    assert ours == pytest.approx(theirs, rel=1e-12, abs=0)
