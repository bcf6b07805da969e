"""Twenty steps of instruction tuning against TRL's, and losses against mlx-lm's tuner.

TRL's values come from `scripts/tools/goldens/trl_sft.py`.
"""

import json
from itertools import islice

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_unpaired
from mlx_dpo.losses.metrics import step_row
from mlx_dpo.models.load import load_model
from mlx_dpo.schemas import parse_supervised
from mlx_dpo.schemas.schema import Row, RowRules
from mlx_dpo.scoring.scorers import make_shared_scorer, plain_scorer
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch, TrainingPlan
from mlx_dpo.training.step import loss_and_gradients
from mlx_dpo.types import PairLogps
from scripts.tools.goldens import trl_sft as sft
from scripts.tools.goldens import trl_sigmoid as trl

SEED = 5  # of our order of the rows, which is undone here: TRL takes them as they stand
SFT = DPOConfig(loss_type="sft")


def load():
    return load_model(str(trl.MODEL), dtype="float32")


@pytest.fixture(scope="module")
def golden():
    golden = json.loads(sft.GOLDEN.read_text())
    found = {path.name: trl.sha256(path.read_bytes()) for path in trl.SOURCES}
    assert golden["sources"] == found, f"run {golden['made_by']} again"
    assert {name: run["settings"] for name, run in golden["runs"].items()} == sft.RUNS
    return golden["runs"]


def tokenize(rows, base, turns="all"):
    rules = RowRules(supervised=True, assistant_turns=turns)
    examples = [parse_supervised(Row(row, f"rows:{i}"), rules)[0] for i, row in enumerate(rows)]
    tokens = TokenRules(vocab_size=base.vocab_size)
    return [tokenize_unpaired(base.tokenizer, example, tokens).pair for example in examples]


@pytest.fixture(scope="module")
def rows():
    base = load()
    return {name: tokenize(sft.rows_of(name), base) for name in sft.RUNS}


def order_of(count):
    """Where a row has to lie so that the steps meet the rows as they stand."""
    steps = range(count // trl.BATCH)
    taken = [PairOrder(count=count, batch_size=trl.BATCH, seed=SEED).step(k) for k in steps]
    return np.argsort([place for step in taken for place in step]).tolist()


def set_initial_a(policy, run):
    modules = adapters.adapted_layers(policy)
    for name, factor in trl.initial_a(run["adapted"], rank=run["settings"]["lora_r"]).items():
        modules[name].lora_a = mx.array(factor.T)


def through_the_loop(run, pairs, *, scorer, size):
    settings, base = run["settings"], load()
    scale = settings["lora_alpha"] / settings["lora_r"]
    adapters.attach_adapters(base.model, rank=settings["lora_r"], scale=scale)
    set_initial_a(base.model, run)
    zeros = mx.zeros((len(pairs),))
    plan = TrainingPlan(
        pairs=[pairs[i] for i in order_of(len(pairs))], reference=PairLogps(zeros, zeros),
        objective=Objective(SFT), learning_rate=lambda done: settings["learning_rate"],
        total_steps=settings["steps"], batch_size=trl.BATCH, limit=PassLimit(pairs=size),
        max_grad_norm=settings["max_grad_norm"], seed=SEED, scorer=scorer,
    )  # fmt: skip
    optimizer = optim.AdamW(1.0, weight_decay=settings["weight_decay"], bias_correction=True)
    for _, metrics in train(base.model, optimizer, plan, start=Progress()):
        yield step_row(metrics)


def through_a_run(run, folder):
    """The second run as a user starts it: whole conversations, of which the last answer counts."""
    settings = dict(run["settings"])
    del settings["rows_per_pass"]
    rows = sft.conversations(trl.first_lines(sft.LINES), trl.BATCH * settings.pop("steps"))
    lines = [json.dumps(rows[place]) + "\n" for place in order_of(len(rows))]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "valid.jsonl").write_text(lines[0])
    config = DPOConfig(
        model=str(trl.MODEL), pairs=str(folder / "rows.jsonl"), valid=str(folder / "valid.jsonl"),
        output=str(folder / "run"), dtype="float32", loss_type="sft", assistant_turns="last",
        batch_size=trl.BATCH, micro_batch_size=5, seed=SEED, samples=0,
        lr_scheduler_type="constant", group_by_prompt=False, **settings,
    )  # fmt: skip
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        set_initial_a(trainer.policy, run)
        yield from (row for row in trainer.steps() if "loss" in row)


@pytest.fixture(scope="module", params=["trie", "plain", "a whole run"])
def comparison(request, golden, rows, tmp_path_factory):
    if request.param == "a whole run":
        run = golden["last answers"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLX_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
            yield list(through_a_run(run, tmp_path_factory.mktemp("run"))), run["steps"]
        return
    run, scorer = golden["conversations"], plain_scorer
    if request.param == "trie":
        vocab_size = load().vocab_size
        scorer = make_shared_scorer(vocab_size=vocab_size, gradients=True, packing="trie")
    size = 4 if request.param == "trie" else 7  # 7, 7 and 2: their means would not add up
    steps = through_the_loop(run, rows["conversations"], scorer=scorer, size=size)
    count = 20 if request.param == "trie" else 4
    yield list(islice(steps, count)), run["steps"][:count]


@pytest.mark.parametrize("name", sft.RUNS)
def test_tokens_and_masks_are_those_of_trl(golden, rows, name):
    made = [
        ([*pair.prompt, *pair.chosen], [len(pair.prompt) + i for i in pair.scored])
        for pair in rows[name]
    ]
    first = [tuple(part) for part in golden[name]["tokens"]["first"]]
    assert made[: len(first)] == first
    assert trl.tokens_digest(made) == golden[name]["tokens"]["sha256"]


def test_the_last_answer_of_a_conversation_is_the_completion_of_its_prompt(rows):
    conversations = sft.conversations(trl.first_lines(sft.LINES), 6)
    alone = tokenize(conversations, load(), "last")
    assert [(p.prompt, p.chosen, p.gaps) for p in alone] == [
        (p.prompt, p.chosen, ()) for p in rows["last answers"][:6]
    ]


def test_every_step_has_the_loss_of_trl(comparison):
    ours, theirs = ([row["loss"] for row in rows] for rows in comparison)
    print(f"loss: largest difference {np.abs(np.subtract(ours, theirs)).max():.1e}")
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_every_step_has_the_gradient_norm_of_trl(comparison):
    ours, theirs = ([row["grad_norm"] for row in rows] for rows in comparison)
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_tokens_are_counted_as_in_trl(comparison):
    ours, theirs = ([row["num_tokens"] for row in rows] for rows in comparison)
    assert ours == theirs


def test_token_accuracy_is_that_of_trl(comparison):
    """TRL takes the mean over passes, which is the mean over tokens only of one pass per step."""
    ours, theirs = ([row["mean_token_accuracy"] for row in rows] for rows in comparison)
    is_exact = len(theirs) == sft.LAST_ANSWERS["steps"]
    assert ours == pytest.approx(theirs, abs=1e-6 if is_exact else 0.02)


def test_the_golden_values_can_reveal_an_error(golden):
    """The loss falls far beyond the tolerance, and of the gradients some are clipped."""
    losses = [step["loss"] for step in golden["conversations"]["steps"]]
    assert losses[0] - min(losses) > 0.2
    norms = [step["grad_norm"] for step in golden["last answers"]["steps"]]
    bound = golden["last answers"]["settings"]["max_grad_norm"]
    assert min(norms) < bound < max(norms)


@pytest.mark.parametrize("packing", ["trie", "row", "lengths", None])
def test_loss_and_gradients_are_those_of_mlx_lms_tuner(rows, packing):
    """mlx-lm scores one range of tokens in each row: the last answers."""
    pairs, base = rows["last answers"][:5], load()
    adapters.attach_adapters(base.model, rank=4, scale=2.0)
    scorer = plain_scorer
    if packing is not None:
        scorer = make_shared_scorer(vocab_size=base.vocab_size, gradients=True, packing=packing)
    batch = MicroBatch.of(pairs, PairLogps(mx.zeros((5,)), mx.zeros((5,))))
    base.model.train()
    outputs, gradients = loss_and_gradients(base.model, Objective(SFT), [batch], scorer=scorer)

    width = max(len(pair.prompt) + len(pair.chosen) for pair in pairs)
    tokens = np.zeros((5, width), np.int32)
    for row, pair in zip(tokens, pairs, strict=True):
        row[: len(pair)] = pair.prompt + pair.chosen
    # The lengths count the target tokens: from the first of an answer to its last.
    lengths = mx.array([(len(pair.prompt), len(pair) - 1) for pair in pairs])

    def theirs(model):
        return default_loss(model, mx.array(tokens), lengths)

    (loss, count), expected = nn.value_and_grad(base.model, theirs)(base.model)
    assert count.item() == sum(len(pair.chosen) for pair in pairs)
    # On the CPU, MLX's own cross-entropy is exact to 1e-5; ours is that of TRL.
    assert outputs.losses.mean().item() == pytest.approx(loss.item(), abs=2e-5)
    ours = dict(tree_flatten(gradients))
    for name, gradient in tree_flatten(expected):
        assert mx.allclose(ours[name], gradient, rtol=1e-3, atol=1e-5), name
