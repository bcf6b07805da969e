"""Raise the log-probs of chosen answers, and lower those of rejected ones.

    loss = -log π(chosen|x) + α log π(rejected|x)

Source: Rafailov et al. 2023, arXiv:2305.18290, section 6 and appendix C.3 (there after Welleck et
al. 2019, arXiv:1908.04319, whose loss is bounded per token).
"""

from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from scripts.studies.baselines.answer_tokens import load_trainable, token_logps
from scripts.studies.baselines.reward_model import TokenPairs


def unlikelihood_loss(model: nn.Module, pairs: TokenPairs, alpha: float) -> mx.array:
    """Return the mean loss of pairs, in nats per pair."""
    chosen = token_logps(model, pairs.chosen).sum(axis=1)
    rejected = token_logps(model, pairs.rejected).sum(axis=1)
    return (alpha * rejected - chosen).mean()


def train_unlikelihood(
    folder: Path,
    pairs: TokenPairs,
    *,
    alpha: float,
    rate: Callable[[mx.array], mx.array],
    batch_size: int,
    steps: int,
    seed: int,
) -> Iterator[tuple[int, nn.Module, int]]:
    """Yield step, policy and the number of answer tokens of each step.

    Args:
        rate: schedule of the learning rate, by step.
    """
    model = load_trainable(folder)
    optimizer, draw = optim.Adam(rate, bias_correction=True), np.random.default_rng(seed)
    step = nn.value_and_grad(model, unlikelihood_loss)
    epochs = chain.from_iterable(pairs.epoch(batch_size, draw) for _ in count())
    for number, batch in enumerate(islice(epochs, steps), 1):
        _, gradients = step(model, batch, alpha)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
        yield number, model, batch.count()
