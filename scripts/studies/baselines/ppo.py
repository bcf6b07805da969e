"""Proximal policy optimization with a KL penalty per token, as RLHF uses it.

Each iteration samples answers from the policy, and rewards each token with

    r_t = -β [log π_old(y_t|x, y_<t) - log π_ref(y_t|x, y_<t)], plus the score at the last token,

so that the expected return is E[score] - β KL(π_old ‖ π_ref). It estimates advantages by GAE,
whitens them, and takes several steps on the clipped losses of policy and critic, which are two
networks that both begin at the checkpoint.

Sources: Schulman et al. 2017, arXiv:1707.06347, Eq. 7 (clipped loss); Schulman et al. 2016,
arXiv:1506.02438, Eq. 16 (GAE); Ziegler et al. 2019, arXiv:1909.08593, Eq. 2 (KL penalty);
Ouyang et al. 2022, arXiv:2203.02155. GAE's λ, clip range and epochs are the defaults of TRL.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from scripts.studies.baselines.answer_tokens import (
    AnswerTokens,
    ScalarModel,
    load_trainable,
    sample_answers,
    token_logps,
)

Score = Callable[[AnswerTokens], mx.array]


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Settings of PPO; γ is 1.

    Attributes:
        beta: coefficient of the KL penalty.
        iterations: how often answers are sampled.
        batch_size: answers per iteration.
        epochs: passes over the answers of an iteration.
        length: tokens of an answer at most.
        gae_lambda: λ of GAE.
        clip: range of probability ratios, and of changes of values.
        seed: seed of the samples.
    """

    beta: float
    learning_rate: float
    critic_rate: float
    iterations: int
    batch_size: int
    length: int
    seed: int
    epochs: int = 4
    gae_lambda: float = 0.95
    clip: float = 0.2


class Rollout(NamedTuple):
    """Sampled answers, and what was computed of them before the steps. (B, T) but for `batch`"""

    batch: AnswerTokens
    logps: mx.array
    values: mx.array
    advantages: mx.array
    returns: mx.array


def penalized_rewards(
    scores: mx.array, logps: mx.array, reference: mx.array, mask: mx.array, beta: float
) -> mx.array:
    """Return the reward of each token: the KL penalty, and the score at the last one. (B, T)"""
    after = mx.concatenate([mask[:, 1:], mx.zeros_like(mask[:, :1])], axis=1)
    is_last = mask * (1 - after)
    return -beta * (logps - reference) * mask + scores[:, None] * is_last


def estimate_advantages(
    rewards: mx.array, values: mx.array, mask: mx.array, gae_lambda: float
) -> mx.array:
    """Return the advantages of GAE with γ = 1; the value after the last token is 0. (B, T)

    A_t = δ_t + λ A_{t+1},  δ_t = r_t + V_{t+1} - V_t
    """
    advantage = next_value = mx.zeros_like(rewards[:, 0])
    reverse = []
    for t in reversed(range(rewards.shape[1])):
        value = values[:, t] * mask[:, t]
        delta = rewards[:, t] + next_value - value
        advantage = (delta + gae_lambda * advantage) * mask[:, t]
        reverse.append(advantage)
        next_value = value
    return mx.stack(reverse[::-1], axis=1)


def masked_mean(values: mx.array, mask: mx.array) -> mx.array:
    """Return the mean over the tokens of the answers."""
    return (values * mask).sum() / mask.sum()


def whiten(values: mx.array, mask: mx.array) -> mx.array:
    """Return the values with mean 0 and variance 1 over the tokens of the answers."""
    centred = values - masked_mean(values, mask)
    return centred * mx.rsqrt(masked_mean(centred**2, mask) + 1e-8)


def policy_loss(
    logps: mx.array, old: mx.array, advantages: mx.array, mask: mx.array, clip: float
) -> mx.array:
    """Return the clipped loss, -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A), of the ratios ρ = π / π_old."""
    ratios = mx.exp(logps - old)
    clipped = mx.clip(ratios, 1 - clip, 1 + clip)
    return masked_mean(-mx.minimum(ratios * advantages, clipped * advantages), mask)


def value_loss(
    values: mx.array, old: mx.array, returns: mx.array, mask: mx.array, clip: float
) -> mx.array:
    """Return half of the larger squared error, of the values and of the clipped values."""
    clipped = mx.clip(values, old - clip, old + clip)
    return 0.5 * masked_mean(mx.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


class ActorCritic(nn.Module):
    """The policy and its critic."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.policy = load_trainable(folder)
        self.critic = ScalarModel(folder)

    def values(self, batch: AnswerTokens) -> mx.array:
        """Return the value before each token of the answers. (B, T)"""
        values: mx.array = self.critic(batch.tokens[:, :-1])[:, -batch.mask.shape[1] :]
        return values

    def loss(self, rollout: Rollout, clip: float) -> mx.array:
        """Return the sum of both losses; the networks share no parameter."""
        mask = rollout.batch.mask
        logps = token_logps(self.policy, rollout.batch)
        values = self.values(rollout.batch)
        return policy_loss(logps, rollout.logps, rollout.advantages, mask, clip) + value_loss(
            values, rollout.values, rollout.returns, mask, clip
        )


class Iteration(NamedTuple):
    """An iteration: its number, the policy after it, and the answer tokens that it sampled."""

    number: int
    policy: nn.Module
    tokens: int


def train_ppo(
    folder: Path, prompts: mx.array, score: Score, settings: PPOSettings
) -> Iterator[Iteration]:
    """Train the checkpoint in `folder`; yield each iteration.

    Args:
        prompts: token ids of prompts of one length, which take turns. (prompts, P)
        score: function that returns the scores of answers. (B,)
    """
    model, reference = ActorCritic(folder), load_trainable(folder)
    steps = settings.iterations * settings.epochs
    optimizers = {
        "policy": optim.Adam(
            optim.linear_schedule(settings.learning_rate, 0.0, steps), bias_correction=True
        ),
        "critic": optim.Adam(settings.critic_rate, bias_correction=True),
    }
    gradient = nn.value_and_grad(model, ActorCritic.loss)
    repeated = mx.tile(prompts, (settings.batch_size // len(prompts), 1))
    keys = mx.random.split(mx.random.key(settings.seed), settings.iterations)
    for number, key in enumerate(keys, 1):
        batch = sample_answers(model.policy, repeated, settings.length, key)
        rollout = make_rollout(model, reference, batch, score(batch), settings)
        mx.eval(rollout)
        for _ in range(settings.epochs):
            _, gradients = gradient(model, rollout, settings.clip)
            for name, optimizer in optimizers.items():
                optimizer.update(model[name], gradients[name])
                mx.eval(model[name].trainable_parameters(), optimizer.state)
        yield Iteration(number, model.policy, batch.count())


def make_rollout(
    model: ActorCritic,
    reference: nn.Module,
    batch: AnswerTokens,
    scores: mx.array,
    settings: PPOSettings,
) -> Rollout:
    """Return the answers with rewards turned into whitened advantages and returns."""
    logps, values = token_logps(model.policy, batch), model.values(batch)
    rewards = penalized_rewards(
        scores, logps, token_logps(reference, batch), batch.mask, settings.beta
    )
    advantages = estimate_advantages(rewards, values, batch.mask, settings.gae_lambda)
    return Rollout(
        batch, logps, values, whiten(advantages, batch.mask), advantages + values * batch.mask
    )
