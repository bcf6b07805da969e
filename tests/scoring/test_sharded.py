"""A sharded model computes the log-probs and gradients of the whole one, bit for bit.

`sharded_architectures.py` compares all architectures on real ranks; here the ranks are in one
process.
"""

import gc
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import named_arrays, random_state
from mlx_dpo.models import load
from mlx_dpo.models.load import load_model
from mlx_dpo.models.sharded.shard_model import find_shards, shard_model
from mlx_dpo.profiling.memory import parameter_bytes
from mlx_dpo.scoring.equivalence import random_pairs
from mlx_dpo.scoring.scorers import Scorer, make_shared_scorer, plain_scorer
from mlx_dpo.scoring.sharded.gathered_blocks import measuring
from mlx_dpo.scoring.sharded.value_and_grad import value_and_grad
from tests.checkpoints import make_checkpoint
from tests.scoring import architectures
from tests.scoring.sharded_models import (
    RanksInTurn,
    adapt,
    build,
    different_bits,
    numbers,
    randomize_adapters,
    shard,
)

LENGTHS = ((9, 6, 2), (5, 3, 7))


def trie() -> Scorer:
    return make_shared_scorer(vocab_size=architectures.VOCAB, gradients=True, packing="trie")


def batched() -> Scorer:
    return make_shared_scorer(vocab_size=architectures.VOCAB, gradients=True, packing="batch")


def pairs_of(rank: int):
    """Other pairs, of other lengths and in another number, for each rank."""
    lengths = [(p + rank, c + rank, r) for p, c, r in LENGTHS]
    return random_pairs(lengths[: 2 - rank % 2], architectures.VOCAB)


@pytest.mark.parametrize(
    ("model_type", "bits", "scorer"),
    [
        pytest.param("llama", 0, trie(), marks=pytest.mark.slow),
        ("qwen3_moe", 4, trie()),  # experts
        # Sliding windows, tied embedding; attention and state space; keys of earlier blocks.
        pytest.param("gemma3_text", 4, plain_scorer, marks=pytest.mark.slow),
        pytest.param("falcon_h1", 0, plain_scorer, marks=pytest.mark.slow),
        pytest.param("gemma4_text", 0, batched(), marks=pytest.mark.slow),
        # Writes to what its blocks return.
        pytest.param("gemma3n", 0, plain_scorer, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value) if isinstance(value, str | int) else "",
)
def test_a_sharded_model_computes_what_the_whole_one_computes(model_type, bits, scorer):
    whole = build(model_type, bits)
    adapt(whole)
    models = shard(partial(build, model_type, bits), 2)
    for rank, (model, shards) in enumerate(models):
        adapt(model)
        expected = numbers(whole, scorer, pairs_of(rank))
        assert different_bits(numbers(model, scorer, pairs_of(rank)), expected) == []
        total = shards.held_bytes + shards.absent_bytes
        assert shards.held_bytes <= total / 2 + 64 * len(shards.blocks)


def test_adapters_outside_of_the_blocks_get_the_gradients_of_the_whole_model():
    """They come before and after the blocks; a second pass adds dropout between and in blocks."""

    def adapt_everywhere(model: nn.Module) -> None:
        targets = ["embed_tokens", "lm_head", "q_proj", "down_proj"]
        attach_adapters(model, rank=2, scale=2.0, target_modules=targets, dropout=0.3)
        randomize_adapters(model)

    whole = build("llama")
    adapt_everywhere(whole)
    [(model, _), _] = shard(partial(build, "llama"), 2)
    adapt_everywhere(model)
    for scorer in (plain_scorer, trie()):
        found = []
        for policy in (whole, model):
            mx.random.seed(3)
            found.append(numbers(policy, scorer, pairs_of(0)) | {"state": mx.array(random_state())})
        assert different_bits(found[1], found[0]) == []
        assert any("embed_tokens" in name for name in found[0])


def test_transposed_weights_keep_their_layout():
    """Products with a matrix and with its transposed copy may round differently."""

    def build_transposed() -> nn.Module:
        model = build("llama")
        for layer in model.layers:
            linear = layer.mlp.down_proj
            linear.weight = mx.contiguous(linear.weight.T).T
        mx.eval(model.parameters())
        return model

    whole = build_transposed()
    adapt(whole)
    for rank, (model, shards) in enumerate(shard(build_transposed, 2)):
        adapt(model)
        assert all((1, 0) in shard.axes.values() for shard in shards.shards)
        expected = numbers(whole, plain_scorer, pairs_of(rank))
        assert different_bits(numbers(model, plain_scorer, pairs_of(rank)), expected) == []


def test_a_rank_holds_its_part_and_no_whole_block():
    """MLX's count of bytes while nothing runs, without embedding, head and adapters."""
    before = mx.get_active_memory()
    models = shard(partial(build, "llama"), 3)
    adapt(models[0][0])
    numbers(models[0][0], plain_scorer, pairs_of(0))
    shards = [shards for _, shards in models]
    for model, of_rank in models:
        of_rank.whole.clear()
        assert mx.isnan(model.layers[0].input_layernorm.weight).all()
    gc.collect()
    mx.clear_cache()
    total = shards[0].held_bytes + shards[0].absent_bytes
    outside = sum(
        value.nbytes
        for model, _ in models
        for name, value in named_arrays(model.parameters()).items()
        if ".layers." not in name or ".lora_" in name
    )
    held = mx.get_active_memory() - before
    assert held <= 1.05 * total + outside  # all three ranks together hold the blocks once


@pytest.mark.parametrize("unpacks", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_rank_loads_its_part_without_ever_holding_the_whole(tmp_path, monkeypatch, unpacks):
    """On a GPU weights stay as they are stored; on the CPU blocks are unpacked one by one."""
    folder = make_checkpoint(tmp_path / "model", hidden=256, num_hidden_layers=12)
    monkeypatch.setattr(load, "is_cpu", lambda: unpacks)
    size = 3
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    bits = None if unpacks else 4
    ranks = RanksInTurn(1, size, {})
    model = load_model(str(folder), bits=bits, shard_over=lambda model: ranks).model
    peak = mx.get_peak_memory() - before
    shards = find_shards(model)
    gathered = shards.gathered_bytes
    compared = sum(array.nbytes for arrays in shards.whole.values() for array in arrays)
    shards.whole.clear()
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory() - before
    blocks = shards.held_bytes + shards.absent_bytes
    outside = sum(
        value.nbytes
        for name, value in named_arrays(model.parameters()).items()
        if ".layers." not in name
    )
    assert held - outside <= (1 / size + 0.05) * blocks
    # The first blocks, until they are compared, and the block that is being sharded. What MLX
    # packs here was float32.
    assert peak <= held + compared + gathered * (1 if unpacks else 8) + outside
    assert peak < 0.75 * (blocks if unpacks else 2 * blocks)


def test_memory_of_a_pass_is_measured_without_the_other_ranks():
    """Ranks measure passes of different sizes, according to their memory."""
    model, shards = shard(partial(build, "llama"), 2)[0]
    adapt(model)
    assert isinstance(shards.ranks, RanksInTurn)
    shards.ranks.seen.clear()
    with measuring(model):
        numbers(model, plain_scorer, pairs_of(0))
    whole = build("llama")
    adapt(whole)
    assert parameter_bytes(model) == parameter_bytes(whole) - shards.absent_bytes
    with pytest.raises(KeyError):
        numbers(model, plain_scorer, pairs_of(0))


def test_a_sharded_model_gives_no_gradient_to_others():
    """MLX would take the outputs of the blocks for constants, and the gradients would be zero."""
    model = shard(partial(build, "llama"), 2)[0][0]
    adapt(model)
    with pytest.raises(RuntimeError, match="value_and_grad"):
        nn.value_and_grad(model, lambda policy: policy(mx.array([[1, 2, 3]])).sum())(model)


def test_models_that_cannot_be_sharded_are_refused():
    model = build("llama")
    model.layers[1].mlp.up_proj = model.layers[0].mlp.up_proj
    with pytest.raises(ModelError, match="have weights in common"):
        shard_model(model, RanksInTurn(0, 2, {}))
    model = build("iquestloopcoder")  # calls parts of its blocks
    adapt(model)
    model = shard(partial(build, "iquestloopcoder"), 2)[0][0]
    adapt(model)
    with pytest.raises(RuntimeError, match="parts of its blocks"):
        value_and_grad(model, lambda policy: policy(mx.array([[1, 2, 3]])).sum())(model)
