"""The methods of the reward-KL study on equal data; each yields its policy as it is trained."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from scripts.studies.baselines.ppo import PPOSettings, Score, train_ppo
from scripts.studies.baselines.reward_model import score_answers, train_reward_model
from scripts.studies.baselines.unlikelihood import train_unlikelihood
from scripts.studies.parts.reward_kl.world import (
    LENGTH,
    Progress,
    World,
    as_tokens,
    has_text,
    true_scores,
)
from scripts.studies.toy.reviews import LOWEST, SUBJECTS, VOCABULARY
from scripts.studies.toy.train import train_by_steps

BATCH = 64  # pairs per step, and answers per iteration of PPO
STEPS, WARMUP, ITERATIONS = 96, 10, 24
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of a run, where its policy is measured
RATES = {  # learning rate of each method
    "dpo": 3e-4,
    "preferred_ft": 1e-3,
    "unlikelihood": 1e-3,
    "reward_model": 1e-3,
    "ppo": 4e-4,
    "critic": 1e-3,
}


def points(steps: int) -> list[int]:
    """Return the steps after which a policy is measured."""
    return [round(share * steps) for share in SHARES]


def dpo_folder(world: World, folder: Path, beta: float) -> Path:
    """Return the run folder of DPO with a β."""
    return folder / f"dpo-{beta}-{world.seed}"


def dpo(world: World, folder: Path, beta: float) -> Iterator[Progress]:
    """Train with the package's DPO."""
    output = dpo_folder(world, folder, beta)
    return _train_pairs(world, output, "dpo", beta=beta, seed=world.seed)


def preferred_ft(world: World, folder: Path, order: int) -> Iterator[Progress]:
    """Train with the package's SFT on chosen answers, in one of several orders."""
    seed = 10 * world.seed + order
    output = folder / f"sft-{order}-{world.seed}"
    return _train_pairs(world, output, "preferred_ft", loss_type="sft", seed=seed)


def _train_pairs(world: World, output: Path, method: str, **settings: object) -> Iterator[Progress]:
    trained, rows = 0.0, [pair._asdict() for pair in world.pairs]
    common = {"batch_size": BATCH, "micro_batch_size": BATCH, "max_steps": STEPS}
    common |= {"learning_rate": RATES[method]}
    common |= {"lr_scheduler_type": "linear", "warmup_steps": WARMUP}
    for step, policy, row in train_by_steps(world.model, rows, output, **common, **settings):
        trained += BATCH * (row["lengths/chosen"] + row.get("lengths/rejected", 0.0))
        yield Progress(step, policy, world.sampled_tokens, round(trained))


def unlikelihood(world: World, alpha: float) -> Iterator[Progress]:
    """Raise chosen answers and lower rejected ones."""
    trained = 0
    for step, policy, tokens in train_unlikelihood(
        world.model,
        as_tokens(world.pairs),
        alpha=alpha,
        rate=optim.join_schedules(
            [
                optim.linear_schedule(0.0, RATES["unlikelihood"], WARMUP),
                optim.linear_schedule(RATES["unlikelihood"], 0.0, STEPS - WARMUP),
            ],
            [WARMUP],
        ),
        batch_size=BATCH,
        steps=STEPS,
        seed=world.seed,
    ):
        trained += tokens
        yield Progress(step, policy, world.sampled_tokens, trained)


def ppo(
    world: World, beta: float, score: Score = true_scores, iterations: int = ITERATIONS
) -> Iterator[Progress]:
    """Train with PPO; by default the scores are the true rewards."""
    settings = PPOSettings(
        beta=beta,
        learning_rate=RATES["ppo"],
        critic_rate=RATES["critic"],
        iterations=iterations,
        batch_size=BATCH,
        length=LENGTH,
        seed=world.seed,
    )
    prompts = mx.array([VOCABULARY.prompt_ids(subject) for subject in SUBJECTS])
    sampled = 0
    for number, policy, tokens in train_ppo(world.model, prompts, score, settings):
        sampled += tokens
        yield Progress(number, policy, sampled, settings.epochs * sampled)


class Learned(NamedTuple):
    """A reward model, and what it cost."""

    score: Score
    trained_tokens: int
    seconds: float
    peak_mb: float


def learn_reward(world: World) -> Learned:
    """Learn a reward model from the pairs."""
    before, start = mx.get_active_memory(), time.perf_counter()
    mx.reset_peak_memory()
    pairs = as_tokens(world.pairs)
    model = train_reward_model(
        world.model,
        pairs,
        as_tokens(world.held_out),
        learning_rate=RATES["reward_model"],
        batch_size=BATCH,
        seed=world.seed,
    )
    seconds = time.perf_counter() - start
    peak_mb = (mx.get_peak_memory() - before) / 1e6
    tokens = model.epochs * pairs.count()
    return Learned(learned_scores(model.network), tokens, seconds, peak_mb)


def ppo_with_reward_model(world: World, beta: float, learned: Learned) -> Iterator[Progress]:
    """Train with PPO on the scores of a reward model, whose tokens count too."""
    for step, policy, sampled, trained in ppo(world, beta, learned.score):
        tokens = world.sampled_tokens + sampled
        yield Progress(step, policy, tokens, learned.trained_tokens + trained)


def learned_scores(model: nn.Module) -> Score:
    """Return the scores of a reward model; an answer without an end has the lowest true reward."""
    return lambda batch: mx.where(mx.array(has_text(batch)), score_answers(model, batch), LOWEST)
