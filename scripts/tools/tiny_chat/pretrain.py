"""Token ids of dialogues -> a trained Llama. Knows nothing of topics or registers."""

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.llama import Model, ModelArgs

from scripts.tools.tiny_chat.tokenizer import MAX_POSITIONS

# Input widths are multiples of 64, so that every matrix can be quantised in groups of 64.
ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": True,
}
TYPICAL_ANSWER = 12  # tokens
STREAMS = 2
POOL = 64  # batches that are sorted by length together


class Rates(NamedTuple):
    """Learning rates: a rise over `warmup` updates, then a cosine."""

    peak: float = 2.5e-3
    last: float = 5e-5
    warmup: int = 150


class Dialogue(NamedTuple):
    """Token ids, and which of them an assistant wrote (its stop token included)."""

    tokens: list[int]
    spoken: list[bool]


class Shard(NamedTuple):
    """What one stream sees. S: the number of targets."""

    inputs: mx.array  # (N, T) int32, padded on the right
    positions: mx.array  # (S,) flat indices into N * T
    targets: mx.array  # (S,) the token that follows each position


def new_model(vocabulary: int, seed: int) -> Model:
    """A Llama with small normal weights."""
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict({**ARCHITECTURE, "vocab_size": vocabulary}))
    depth = math.sqrt(2 * ARCHITECTURE["num_hidden_layers"])

    def start(path: str, weight: mx.array) -> mx.array:
        if weight.ndim == 1:
            return weight
        scale = 0.05 / depth if path.endswith(("o_proj.weight", "down_proj.weight")) else 0.05
        return mx.random.normal(weight.shape, scale=scale)

    model.update(_map_with_path(start, model.parameters()))
    mx.eval(model.parameters())
    return model


def _map_with_path(change: Callable[[str, mx.array], mx.array], tree: dict) -> dict:
    leaves: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]
    return tree_unflatten([(path, change(path, leaf)) for path, leaf in leaves])


def shard(dialogues: list[Dialogue], pad: int) -> Shard:
    """Pads to the longest; targets are the spoken tokens."""
    width = max(len(dialogue.tokens) for dialogue in dialogues)
    inputs = np.full((len(dialogues), width), pad, dtype=np.int32)
    positions, targets = [], []
    for row, (tokens, spoken) in enumerate(dialogues):
        inputs[row, : len(tokens)] = tokens
        # The mark sits on the token to be predicted; the position that predicts it is one before.
        places = [place for place, is_spoken in enumerate(spoken) if is_spoken]
        positions += [row * width + place - 1 for place in places]
        targets += [tokens[place] for place in places]
    return Shard(mx.array(inputs), mx.array(positions), mx.array(targets))


def batches(dialogues: Iterator[Dialogue], size: int, seed: int) -> Iterator[list[list[Dialogue]]]:
    """Endless batches of like length, each split over the streams."""
    rng = np.random.default_rng(seed)
    while True:
        pool = sorted(islice(dialogues, POOL * size), key=lambda dialogue: len(dialogue.tokens))
        groups = [pool[start : start + size] for start in range(0, len(pool), size)]
        for index in rng.permutation(len(groups)):
            yield [groups[index][part::STREAMS] for part in range(STREAMS)]


def loss_sum(model: Model, part: Shard) -> mx.array:
    """Cross-entropy summed over the spoken tokens; only their rows reach the vocabulary."""
    hidden = model.model(part.inputs)
    chosen = hidden.reshape(-1, hidden.shape[-1])[part.positions]
    logits = model.model.embed_tokens.as_linear(chosen)
    return nn.losses.cross_entropy(logits, part.targets, reduction="sum")


def train(
    model: Model,
    dialogues: Iterator[Dialogue],
    *,
    steps: int,
    size: int,
    pad: int,
    seed: int,
    rates: Rates = Rates(),  # noqa: B008  it cannot change
) -> float:
    """Trains in place. -> the mean loss of the last 50 steps, in nats per token."""
    rate = optim.join_schedules(
        [
            optim.linear_schedule(0.0, rates.peak, rates.warmup),
            optim.cosine_decay(rates.peak, steps - rates.warmup, rates.last),
        ],
        [rates.warmup],
    )
    optimizer = optim.AdamW(rate, betas=[0.9, 0.98], weight_decay=0.1, bias_correction=True)
    loss_and_grad = nn.value_and_grad(model, loss_sum)
    streams = [mx.new_stream(mx.default_device()) for _ in range(STREAMS)]
    losses: list[float] = []
    began = time.monotonic()
    for step, parts in enumerate(islice(batches(dialogues, size, seed), steps), 1):
        shards = [shard(part, pad) for part in parts]
        results = []
        for stream, part in zip(streams, shards, strict=True):
            with mx.stream(stream):
                results.append(loss_and_grad(model, part))
        spoken = sum(part.targets.size for part in shards)
        gradient = tree_map(lambda *leaves: sum(leaves), *(grad for _, grad in results))
        # Not by the tokens of this batch: that would weigh short answers, the curt ones, more.
        gradient = tree_map(lambda leaf: leaf / (size * TYPICAL_ANSWER), gradient)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        total = sum(loss for loss, _ in results)
        mx.eval(total, model.state, optimizer.state)
        losses.append(total.item() / spoken)
        if step % 50 == 0:
            seconds = time.monotonic() - began
            print(
                f"step {step}/{steps}  loss {np.mean(losses[-50:]):.4f}  {seconds:.0f} s",
                flush=True,
            )
    return float(np.mean(losses[-50:]))
