"""Program of a rank: train small models by several plans, and print what each rank ends with.

Run by `test_shared_passes`, as one process and as several ranks.
"""

import hashlib
import json
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.errors import TrainingError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.optim.optimizers import build_optimizer
from mlx_dpo.scoring.score_pairs import Processes, score_pairs
from mlx_dpo.scoring.scorers import TOKEN_COUNTS, make_shared_scorer
from mlx_dpo.training.loop import Progress, train
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import TrainingPlan
from mlx_dpo.types import PairLogps, TokenizedPair
from tests.conftest import VOCAB, make_llama

DRAW = np.random.default_rng(0)


def ids(count):
    return tuple(DRAW.integers(1, VOCAB, count).tolist())


PAIRS = [
    TokenizedPair(ids(4 + i), ids(3 + i % 4), ids(2 + i % 3), location=f"pairs:{i}")
    for i in range(14)
]
REFERENCE = PairLogps(mx.linspace(-20.0, -30.0, 14), mx.linspace(-27.0, -16.0, 14))
SHARED = make_shared_scorer(vocab_size=VOCAB, gradients=True, packing="row")
LONGEST = PAIRS[-1]


def infinite_for_the_longest(model, pairs):
    logps = SHARED(model, pairs)
    factor = mx.array([float("inf") if pair is LONGEST else 1.0 for pair in pairs])
    return PairLogps(logps.chosen * factor, logps.rejected)


def make_plan(ranks, **changes):
    processes = Processes(ranks=ranks)

    def score(model, pairs, **options):
        return score_pairs(
            model, pairs, limit=PassLimit(pairs=3), scorer=SHARED, processes=processes
        )

    plan = TrainingPlan(
        pairs=PAIRS,
        reference=REFERENCE,
        objective=Objective(LossSettings(beta=0.1)),
        learning_rate=lambda done: 1e-2,
        total_steps=3,
        batch_size=6,  # the third step has one pass of two pairs
        limit=PassLimit(pairs=2),
        max_grad_norm=0.5,
        seed=0,
        scorer=SHARED,
        cost=TOKEN_COUNTS["row"],
        ranks=ranks,
        score=score,
    )
    return replace(plan, **changes)


CASES = {
    "DPO": {},
    "passes of one pair": {"limit": PassLimit(pairs=1)},
    "recomputed layers": {"recompute": True},
    "a loss of the whole step": {"objective": Objective(LossSettings(loss_type=("aot",)))},
    "dropout": {"dropout": 0.5},
    "bfloat16": {"dtype": mx.bfloat16},
    "two dtypes": {"narrow": True},
    "lockstep": {"lockstep": True, "limit": PassLimit(pairs=4)},
}


def digest(arrays):
    content = {
        name: (str(value.dtype), np.array(value.view(mx.uint8)).tobytes().hex())
        for name, value in arrays.items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def outcome(ranks, *, dropout=0.0, dtype=mx.float32, narrow=False, lockstep=False, **changes):
    policy = make_llama()
    adapters.attach_adapters(policy, rank=4, scale=2.0, seed=1, dropout=dropout)
    policy.set_dtype(dtype)
    for layer in list(adapters.adapted_layers(policy).values())[::2] if narrow else ():
        layer.lora_b = layer.lora_b.astype(mx.bfloat16)
    optimizer = build_optimizer("sgd", policy, 1e-2)
    plan, ranks.in_lockstep = make_plan(ranks, **changes), lockstep
    rows = [metrics for _, metrics in train(policy, optimizer, plan, start=Progress())]
    ranks.in_lockstep = False
    return [digest(named_arrays(policy.trainable_parameters())), repr(rows)]


def scores(ranks):
    progress = []
    logps = score_pairs(
        make_llama(), PAIRS, limit=PassLimit(pairs=3), processes=Processes(ranks=ranks),
        progress=progress.append,
    )  # fmt: skip
    return [logps.chosen.tolist(), logps.rejected.tolist(), sum(progress)]


def message(call):
    try:
        call()
    except TrainingError as error:
        return str(error)
    raise AssertionError("no error")


def main():
    """Write the outcome of each case to the file named by the first argument and the rank."""
    ranks = Ranks.from_environment()
    found = {name: outcome(ranks, **changes) for name, changes in CASES.items()}
    found["scores"] = scores(ranks)
    scorer = infinite_for_the_longest
    found["infinite loss"] = message(lambda: outcome(ranks, scorer=scorer))
    options = {"limit": PassLimit(pairs=1), "processes": Processes(ranks=ranks)}
    found["infinite score"] = message(
        lambda: score_pairs(make_llama(), PAIRS, scorer=scorer, **options)
    )
    with open(f"{sys.argv[1]}-{ranks.rank}.json", "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
