"""Ranks in one process, and models that are sharded over them."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.adapters.targets import linear_names
from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.models.sharded.shard_model import ModelShards, shard_model
from mlx_dpo.scoring.scorers import Scorer, fast_inference, memory_efficient_training
from mlx_dpo.scoring.sharded.gathered_blocks import use_gathered_weights
from mlx_dpo.scoring.sharded.value_and_grad import value_and_grad
from mlx_dpo.types import TokenizedPair
from tests.scoring import architectures

PACKED = (nn.Linear, nn.Embedding, SwitchLinear)


class RanksInTurn(Ranks):
    """A rank whose gathers return what the ranks before it have put in under the same name."""

    def __init__(self, rank: int, size: int, seen: dict[str, list[Any]]) -> None:
        super().__init__()
        self.rank, self.size, self.seen = rank, size, seen

    def all_gather_json(self, name: str, value: Any) -> list[Any]:
        self.seen.setdefault(name, []).append(value)
        return self.seen[name][: self.size]

    def all_gather_rows(self, name: str, mine: mx.array) -> mx.array:
        pieces = self.seen[name]
        assert (pieces[self.rank] == mine).all()
        return mx.stack(pieces)


def build(model_type: str, bits: int = 0) -> nn.Module:
    """A small model with random weights; layers wide enough are packed in `bits` bits."""
    model = architectures.build(model_type)
    if bits:
        nn.quantize(
            model,
            group_size=32,
            bits=bits,
            class_predicate=lambda _, module: (
                type(module) in PACKED and module.weight.shape[-1] % 32 == 0
            ),
        )
    mx.eval(model.parameters())
    return model


def adapt(model: nn.Module) -> None:
    """Random adapters on every linear layer in the blocks, packed or not."""
    kinds: dict[str, set[type]] = {}
    for layer in model.layers:
        for name, module in layer.named_modules():
            kinds.setdefault(name, set()).add(type(module))
    linear = {nn.Linear, nn.QuantizedLinear}
    targets = [name for name in linear_names(model) if kinds[name] <= linear]
    attach_adapters(model, rank=2, scale=2.0, target_modules=targets)
    randomize_adapters(model)


def randomize_adapters(model: nn.Module) -> None:
    """Random values for all trainable weights, as after some steps."""
    rng = np.random.default_rng(2)
    weights = tree_flatten(model.trainable_parameters())
    draws = [(k, mx.array(np.asarray(rng.normal(0, 0.1, v.shape), np.float32))) for k, v in weights]
    model.load_weights(draws, strict=False)
    mx.eval(model.parameters())


def shard(make: Callable[[], nn.Module], size: int) -> list[tuple[nn.Module, ModelShards]]:
    """The model that `make` returns on each of `size` ranks."""
    seen: dict[str, list[Any]] = {}
    models = []
    for rank in range(size):
        model = make()
        shards = shard_model(model, RanksInTurn(rank, size, seen))
        for shard_of_block in shards.shards:
            seen.setdefault(f"weights of {shard_of_block.name}", []).append(shard_of_block.piece)
        use_gathered_weights(model)
        models.append((model, shards))
    for _, shards in models:  # what the last rank has read, the first ones were not told
        for index, own in enumerate(shards.shards):
            own.axes = {k: v for _, other in models for k, v in other.shards[index].axes.items()}
    return models


def numbers(model: nn.Module, scorer: Scorer, pairs: Sequence[TokenizedPair]) -> Arrays:
    """Log-probs with and without gradients, and the gradients of all trainable weights."""

    def loss(policy: nn.Module) -> Any:
        logps = scorer(policy, pairs)
        return -nn.log_sigmoid(0.1 * (logps.chosen - logps.rejected)).sum(), logps

    model.train()
    with memory_efficient_training(model, recompute=True):
        (value, logps), gradients = value_and_grad(model, loss)(model)
        mx.eval(value, logps, gradients)
    model.eval()
    with fast_inference(model):
        scored = scorer(model, pairs)
        mx.eval(scored)
    found = {"loss": value, "chosen": logps.chosen, "rejected": logps.rejected}
    found |= {"scored chosen": scored.chosen, "scored rejected": scored.rejected}
    return found | named_arrays(gradients)


def different_bits(found: Arrays, expected: Arrays) -> list[str]:
    """The names of the numbers that differ in a bit."""
    assert found.keys() == expected.keys()
    return [
        name
        for name, value in expected.items()
        if np.array(found[name]).tobytes() != np.array(value).tobytes()
    ]
