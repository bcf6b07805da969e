"""Runs of iterative and of offline DPO on the same prompts, with as many sampled answers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_dpo import DPOConfig
from mlx_dpo.collect.iterative.folder import IterativeSettings
from mlx_dpo.collect.iterative.trainer import IterativeDPO
from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.config.sampling import Sampling
from scripts.studies.reporting.study import Row
from scripts.studies.toy.genres import HELD_OUT, TRAINING, World, subject_of
from scripts.studies.toy.reviews import reward
from scripts.studies.toy.train import DEFAULTS, train_by_steps, write_rows

Pairs = list[dict[str, Any]]
ANSWERS = 4  # per prompt and round; the best and the worst make a pair
STEPS = 16  # per round
BETA = 1.0
SETTINGS = {
    "batch_size": 58,  # half of the prompts
    "micro_batch_size": 58,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "bad_pairs": "drop",  # an answer may have a special token in its text
}
OFFLINE, SFT = "offline", "best-of-4 SFT"  # methods
BASE = "base"  # whose answers the data are
BEST_WORST, SAMPLED = "best and worst of 4", "Bradley-Terry"  # how pairs are made
MODULE = "scripts.studies.toy.genres"


def open_loop(world: World, name: str, *, rounds: int, **changes: Any) -> IterativeDPO:
    """Return `mlx-dpo loop` with a new output folder; `changes` are settings of the loop."""
    prompts, valid = (
        write_rows(world.folder / f"{name}.jsonl", ({"prompt": prompt} for prompt in texts))
        for name, texts in (("training", TRAINING), ("held-out", HELD_OUT))
    )
    settings = {"answers": ANSWERS, "reference": "base", "reward": f"{MODULE}:true_reward"}
    output = world.folder / f"{name}-{world.seed}"
    config = {"model": str(world.model), "output": str(output), "max_steps": STEPS, "beta": BETA}
    return IterativeDPO(
        DPOConfig.from_dict(DEFAULTS | SETTINGS | config | {"seed": world.seed}),
        IterativeSettings(
            prompts=str(prompts),
            valid_prompts=str(valid),
            rounds=rounds,
            sampling=Sampling(temperature=1.0, max_tokens=6, seed=world.seed),
            **settings | changes,
        ),
    )


def run_loop(
    world: World, trainer: IterativeDPO, method: str, labels: str = BEST_WORST
) -> Iterator[Row]:
    """Run all rounds of a loop; yield a row after each."""
    pairs: Pairs = []
    for stage in trainer.stages():
        trainer.run_stage(stage)
        if stage.action == "collect":
            pairs += read_pairs(trainer.paths.round(stage.round).pairs)
        elif stage.action == "train":
            yield describe(
                world,
                trainer.load_policy(stage.round).base.model,
                pairs,
                method=method,
                labels=labels,
                data="the policy",
                beta=BETA,
                answers=stage.round * len(trainer.prompts.train) * trainer.settings.answers,
                step=stage.round * STEPS,
            )


def describe(world: World, policy: nn.Module, pairs: Pairs, **labels: Any) -> Row:
    """Return the row of a policy that was trained on `pairs`."""
    return world.measure(policy, **labels, pairs=len(pairs), end=1, coverage=world.coverage(pairs))


def collect_offline(trainer: IterativeDPO, folder: Path, rounds: int) -> list[Pairs]:
    """Collect the pairs of each round with the base, as a loop would that never trained."""
    base, found = trainer.load_policy(0), []
    for number in range(1, rounds + 1):
        file = PairsFile(folder / f"round-{number}.jsonl")
        for _ in trainer.pair_collector.collect(number, base, trainer.prompts.train, file):
            pass
        found.append(read_pairs(file.path))
    return found


def read_pairs(path: Path) -> Pairs:
    """Read pairs that the package collected, as texts."""
    return [
        {name: decision.row[name][-1]["content"] for name in ("prompt", "chosen", "rejected")}
        for decision in PairsFile(path).decisions
        if "passed" not in decision.row
    ]


def write_pairs(
    writers: Mapping[str, Mapping[str, float]], rounds: int, draw: np.random.Generator
) -> list[Pairs]:
    """Return the best and the worst of the answers that other writers give to each prompt.

    Args:
        writers: probability of each answer, by subject.
    """
    return [
        [pair for prompt in TRAINING if (pair := _best_and_worst(prompt, writers, draw))]
        for _ in range(rounds)
    ]


def _best_and_worst(
    prompt: str, writers: Mapping[str, Mapping[str, float]], draw: np.random.Generator
) -> dict[str, Any] | None:
    choices = writers[subject_of(prompt)]
    answers = sorted(
        map(str, draw.choice(list(choices), ANSWERS, p=list(choices.values()))), key=reward
    )
    if reward(answers[0]) == reward(answers[-1]):
        return None
    return {"prompt": prompt, "chosen": answers[-1], "rejected": answers[0]}


def run_offline(
    world: World,
    by_round: Sequence[Pairs],
    *,
    data: str = BASE,
    method: str = OFFLINE,
    beta: float = BETA,
    labels: str = BEST_WORST,
    answers: int = ANSWERS,
) -> Iterator[Row]:
    """Train on the pairs of all rounds, with as many steps; yield a row for each round's steps."""
    pairs = [pair for some in by_round for pair in some]
    steps = STEPS * len(by_round)
    loss = {"loss_type": "sft"} if method == SFT else {"beta": beta}
    name = f"{method}-{data}-{beta}-{labels}-{len(by_round)}-{world.seed}".replace(" ", "-")
    for step, policy, _ in train_by_steps(
        world.model,
        pairs,
        world.folder / name,
        max_steps=steps,
        seed=world.seed,
        **SETTINGS | loss,
    ):
        if step % STEPS == 0:
            row = describe(
                world,
                policy,
                pairs,
                method=method,
                labels=labels,
                data=data,
                beta=beta,
                answers=len(by_round) * len(TRAINING) * answers,
                step=step,
            )
            yield row | {"end": int(step == steps)}
