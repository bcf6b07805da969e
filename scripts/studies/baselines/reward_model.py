"""Learn a reward model from preference pairs.

    loss = -log sigmoid(r(x, chosen) - r(x, rejected))

Source: Stiennon et al. 2020, arXiv:2009.01325, section 3.4; Ouyang et al. 2022, arXiv:2203.02155,
Eq. 1 with pairs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from scripts.studies.baselines.answer_tokens import AnswerTokens, ScalarModel


class TokenPairs(NamedTuple):
    """Preference pairs as tokens."""

    chosen: AnswerTokens
    rejected: AnswerTokens

    def epoch(self, size: int, draw: np.random.Generator) -> Iterator["TokenPairs"]:
        """Yield batches of the pairs in random order; a smaller last one is left out."""
        order = draw.permutation(len(self.chosen.tokens))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size].tolist()
            yield TokenPairs(self.chosen.take(rows), self.rejected.take(rows))

    def split(self, size: int) -> Iterator["TokenPairs"]:
        """Yield all pairs in their order, `size` at a time."""
        for start in range(0, len(self.chosen.tokens), size):
            rows = range(start, min(start + size, len(self.chosen.tokens)))
            yield TokenPairs(self.chosen.take(rows), self.rejected.take(rows))

    def count(self) -> int:
        """Return the number of answer tokens."""
        return self.chosen.count() + self.rejected.count()


def score_answers(model: nn.Module, batch: AnswerTokens) -> mx.array:
    """Return the number that a scalar model gives at the last token of each answer. (B,)"""
    length = batch.mask.shape[1]
    last = batch.mask.sum(axis=1).astype(mx.int32) - 1
    return mx.take_along_axis(model(batch.tokens)[:, -length:], last[:, None], axis=1)[:, 0]


def pairwise_loss(model: nn.Module, pairs: TokenPairs) -> mx.array:
    """Return the mean Bradley-Terry loss of pairs."""
    margins = score_answers(model, pairs.chosen) - score_answers(model, pairs.rejected)
    return -nn.log_sigmoid(margins).mean()


class RewardModel(NamedTuple):
    """A trained reward model, and how often it was trained on each pair."""

    network: ScalarModel
    epochs: int


def train_reward_model(
    folder: Path,
    pairs: TokenPairs,
    held_out: TokenPairs,
    *,
    learning_rate: float,
    batch_size: int,
    seed: int,
    epochs: int = 3,
) -> RewardModel:
    """Return the reward model of the epoch with the lowest held-out loss, with mean 0.

    It begins at the checkpoint in `folder`. The mean of its rewards of all answers of the pairs is
    subtracted, because the loss does not determine it.
    """
    model = ScalarModel(folder)
    optimizer = optim.Adam(learning_rate, bias_correction=True)
    step = nn.value_and_grad(model, pairwise_loss)
    best, lowest = model.trainable_parameters(), float("inf")
    for epoch in range(epochs):
        for batch in pairs.epoch(batch_size, np.random.default_rng((seed, epoch))):
            _, gradients = step(model, batch)
            optimizer.update(model, gradients)
            mx.eval(model.trainable_parameters(), optimizer.state)
        loss = float(np.mean([pairwise_loss(model, b).item() for b in held_out.split(batch_size)]))
        if loss < lowest:
            lowest, best = loss, model.trainable_parameters()
    model.update(best)
    parts = [part for batch in pairs.split(batch_size) for part in batch]
    rewards = [np.array(score_answers(model, part)) for part in parts]
    model.head.bias = model.head.bias - float(np.concatenate(rewards).mean())
    return RewardModel(model, epochs)
