"""Shard the frozen base weights over the ranks of a run, and prove that nothing else changes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.attach import attach_adapters, detach_adapters
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.arrays import Arrays, named_arrays
from mlx_dpo.models.device import is_cpu
from mlx_dpo.models.load import ChooseRanks, LoadedModel, load_model
from mlx_dpo.models.restore import preserved_random_state
from mlx_dpo.models.sharded.shard_model import ModelShards, find_shards
from mlx_dpo.phases import phase
from mlx_dpo.profiling.device_memory import available_memory
from mlx_dpo.profiling.layer_subset import LayersNotFoundError, with_layers
from mlx_dpo.profiling.memory import parameter_bytes, total_parameters
from mlx_dpo.runs.distributed.peers import Peers, SharedError
from mlx_dpo.runs.inputs import load_trainable_base
from mlx_dpo.scoring.backbone import UnsupportedModelError
from mlx_dpo.scoring.equivalence import (
    UNSUPPORTED_ERRORS,
    mode_without_dropout,
    perturbed_parameters,
    random_pairs,
)
from mlx_dpo.scoring.scorers import (
    Scorer,
    make_shared_scorer,
    memory_efficient_training,
    plain_scorer,
)
from mlx_dpo.scoring.sharded.gathered_blocks import use_gathered_weights, whole_blocks
from mlx_dpo.scoring.sharded.value_and_grad import value_and_grad
from mlx_dpo.types import TokenizedPair

# Weights that take more of a rank's memory leave too little for activations.
LARGEST_SHARE = 0.75
# Lengths of prompt, chosen and rejected of the compared pairs; other ranks have longer texts.
COMPARED_LENGTHS = ((9, 6, 2), (5, 3, 7))
SHOWN_DIFFERENCES = 3


def base_loader(
    config: DPOConfig, peers: Peers, earlier: Mapping[str, Any] | None
) -> Callable[[DPOConfig], LoadedModel]:
    """Return the function that loads the base model of a run, sharded over the ranks or whole.

    Args:
        earlier: record of a run that is resumed, which may have begun on more ranks.

    Raises:
        ConfigError: `shard_base` is set for one rank.
    """
    if config.shard_base and peers.ranks.is_alone and earlier is None:
        raise ConfigError(
            "`shard_base` has no effect with one rank, which holds the whole model; use --ranks or "
            "--hosts, or leave it out"
        )
    return partial(load_trainable_base, load=model_loader(config, peers))


def model_loader(config: DPOConfig, peers: Peers | None) -> Callable[..., LoadedModel]:
    """Return a function that loads a model like `load_model`, sharded over the ranks or whole."""
    if peers is None or peers.ranks.is_alone:
        return load_model

    def load(source: str, **settings: Any) -> LoadedModel:
        base = load_model(source, shard_over=choose_ranks(config, peers), **settings)
        use_gathered_weights(base.model)
        peers.ranks.in_lockstep = find_shards(base.model) is not None
        return base

    return load


def choose_ranks(config: DPOConfig, peers: Peers) -> ChooseRanks:
    """Return a function that chooses the ranks to shard a model over; None holds it whole.

    Without the setting `shard_base`, a model is sharded if its weights do not fit on one of the
    ranks. All ranks must load the model.
    """
    can_shard = config.fine_tune_type != "full" and config.recompute is not False

    def choose(model: nn.Module) -> Ranks | None:
        ranks = peers.ranks
        if config.shard_base is not None:
            return ranks if config.shard_base else None
        room = available_memory().shared_by(peers.on_this_host).bytes
        # On the CPU, weights are going to be unpacked.
        needed = 4 * total_parameters(model) if is_cpu() else parameter_bytes(model)
        is_large = peers.any("the model is large", needed > LARGEST_SHARE * room)
        return ranks if is_large and can_shard else None

    return choose


def check_same_scorer(base: LoadedModel, name: str, earlier: Mapping[str, Any] | None) -> None:
    """Check that a resumed run, now sharded, has the scorer that it began with.

    Raises:
        ConfigError: the scorer of the run gathers weights differently often on each rank.
    """
    recorded = ((earlier or {}).get("automatic_settings") or {}).get("scorer", name)
    if recorded != name and find_shards(base.model) is not None:
        raise ConfigError(
            f"the run began with the scorer `{recorded}`, which a sharded model cannot have; "
            "resume it with --no-shard-base"
        )


def compare_with_whole(base: LoadedModel, peers: Peers | None) -> None:
    """Check that a sharded model computes what the whole one would, bit for bit.

    The first blocks are compared, whose whole weights were kept until now. Log-probs and gradients
    of all adapters must be equal, on pairs that differ from rank to rank.

    Raises:
        SharedError: a number differs, or the model cannot be compared.
    """
    shards = find_shards(base.model)
    if shards is None or not shards.whole or peers is None:
        return
    with phase("Comparing the sharded model with the whole one"), preserved_random_state():
        differences = _find_differences(base, shards)
        shards.whole.clear()
        mx.clear_cache()
        found = peers.ranks.all_gather_json("differences of the sharded model", differences)
    for rank, difference in enumerate(found):
        if difference:
            raise SharedError(
                f"{peers.name(rank)}: the sharded model {difference}; use --no-shard-base with a "
                "model that fits on each rank"
            )


def _find_differences(base: LoadedModel, shards: ModelShards) -> str:
    """Return what differs between the sharded model and the whole one on this rank, or ""."""
    blocks = [shards.blocks[number] for number in shards.whole]
    with suppress(LayersNotFoundError), with_layers(base.model, blocks):
        if (difference := _difference(base, shards, ("plain", "trie"))) is not None:
            return difference
    # Some models run with all of their blocks only; then the other blocks are gathered twice.
    difference = _difference(base, shards, ("plain",))
    return "cannot be run" if difference is None else difference


def _difference(base: LoadedModel, shards: ModelShards, scorers: Sequence[str]) -> str | None:
    """Return what differs with the blocks that the model has now; None if it does not run."""
    ranks = shards.ranks
    lengths = [(p + ranks.rank, c, r + ranks.rank) for p, c, r in COMPARED_LENGTHS]
    pairs = random_pairs(lengths, base.vocab_size)
    for name in scorers:
        scorer: Scorer = plain_scorer
        if name == "trie":
            scorer = make_shared_scorer(vocab_size=base.vocab_size, gradients=True, packing="trie")
        with _with_adapters(base.model):
            with whole_blocks(shards):
                expected = _numbers(base.model, scorer, pairs)
            if ranks.any(f"{name} scorer is not supported", expected is None):
                return None if name == "plain" else ""
            different = _different(_numbers(base.model, scorer, pairs), expected)
        if different:
            return f"differs from the whole one in {', '.join(different)}"
    return ""


@contextmanager
def _with_adapters(model: nn.Module) -> Iterator[None]:
    """Attach adapters inside the `with` block if the blocks that the model has now have none."""
    if named_arrays(model.trainable_parameters()):
        yield
        return
    attach_adapters(model, rank=2, scale=2.0)
    try:
        yield
    finally:
        detach_adapters(model)


def _numbers(model: nn.Module, scorer: Scorer, pairs: Sequence[TokenizedPair]) -> Arrays | None:
    """Return log-probs and gradients by name; None if the model does not run."""

    def weighted_sum(policy: nn.Module) -> tuple[mx.array, mx.array]:
        logps = mx.concatenate([*scorer(policy, pairs)])
        return (logps * mx.arange(1, len(logps) + 1)).sum(), logps

    try:
        with (
            mode_without_dropout(model, training=True),
            perturbed_parameters(model),
            memory_efficient_training(model, recompute=True),
        ):
            (_, logps), gradients = value_and_grad(model, weighted_sum)(model)
            mx.eval(logps, gradients)
    except (UnsupportedModelError, *UNSUPPORTED_ERRORS):
        return None
    named = named_arrays(gradients)
    return {"log-probs": logps} | {f"the gradient of `{n}`": g for n, g in named.items()}


def _different(found: Arrays | None, expected: Arrays | None) -> list[str]:
    """Return the names of the first arrays that differ in a bit, or are not numbers."""
    if found is None or expected is None:
        return ["whether it runs"]
    names = [
        name
        for name, value in expected.items()
        if not mx.array_equal(found[name].view(mx.uint32), value.view(mx.uint32))
        or mx.isnan(value).any()
    ]
    return names[:SHOWN_DIFFERENCES]
