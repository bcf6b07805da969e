"""A training pass as a GPU gets it: how many kernels it starts, and its numbers, on the CPU."""

import sys
from typing import get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.models.empty_weights import build_model
from mlx_dpo.profiling.bench.shapes import SHAPES, PassShape
from mlx_dpo.scoring.kernels import attention_dispatch
from mlx_dpo.scoring.scorers import (
    Packing,
    make_shared_scorer,
    memory_efficient_training,
    plain_scorer,
)
from mlx_dpo.types import TokenizedPair
from scripts.bench import kernels

PACKED = [name for name in get_args(Packing) if name in ("trie", "row")]
SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "head_dim": 8,
}
WINDOWED = SMALL | {"model_type": "gemma3_text", "sliding_window": 12, "sliding_window_pattern": 2}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize(
    "lengths, dtype, most",
    [
        ("512:128:128:8", mx.float32, 12_000),
        ("106:38:46:8", mx.float32, 7_800),
        ("512:128:128:8", mx.bfloat16, 12_000),
        ("106:38:46:8", mx.bfloat16, 8_200),
    ],
)
def test_a_pass_of_eight_pairs_starts_few_kernels(packing, lengths, dtype, most):
    """Chunks of 64 queries without MLX's fused kernel took 64,353 and 18,849 in float32."""
    shape = SHAPES["smollm2-135m"]
    pairs = PassShape.parse(lengths).draw(shape.vocab_size)
    assert kernels.pass_kernels(shape, pairs, dtype=dtype, packing=packing).kernels <= most


def test_kernels_of_all_layers_are_those_of_three_extrapolated():
    shape = SHAPES["smollm2-135m"]
    pairs = PassShape.parse("106:38:46:2").draw(shape.vocab_size)
    model = kernels.weightless_model(shape, shape.num_hidden_layers, mx.float32)
    counted = kernels.count_kernels(kernels.training_graph(model, pairs, "row"))
    assert kernels.pass_kernels(shape, pairs, dtype=mx.float32, packing="row").kernels == counted


def as_on_a_gpu(monkeypatch):
    """Tell all modules that the device is no CPU; arrays are still computed on it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_dpo.") and hasattr(module, "is_cpu"):
            monkeypatch.setattr(module, "is_cpu", lambda: False)


def scores_and_gradients(model, pairs, score):
    def loss(model):
        chosen, rejected = score(model, pairs)
        return (chosen * mx.arange(1, len(pairs) + 1) - rejected).sum(), (chosen, rejected)

    (_, values), gradients = nn.value_and_grad(model, loss)(model)
    arrays = [*values, *(array for _, array in tree_flatten(gradients))]
    mx.eval(arrays)
    return arrays


@pytest.mark.parametrize("config", [SMALL, WINDOWED], ids=["llama", "sliding window"])
@pytest.mark.parametrize("queries", [16, 1024], ids=["many chunks", "whole texts"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("packing", PACKED)
def test_the_numbers_of_a_gpu_graph_are_those_of_the_plain_scorer(
    monkeypatch, packing, recompute, queries, config
):
    mx.random.seed(0)
    model = build_model(config)
    attach_adapters(model, rank=4, scale=2.0)
    weights = [
        (name, 0.3 * mx.random.normal(value.shape))
        for name, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))
    rng = np.random.default_rng(0)

    def ids(count):
        return tuple(rng.integers(0, 96, count).tolist())

    prompt, start = ids(40), ids(7)
    pairs = [
        TokenizedPair(prompt, start + ids(20), start + ids(9)),
        TokenizedPair(prompt, start + ids(30), ids(1)),
        TokenizedPair(ids(3), ids(5), ids(2)),
        TokenizedPair(prompt[:20] + ids(4), ids(33), ids(70)),
    ]
    expected = scores_and_gradients(model, pairs, plain_scorer)
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(attention_dispatch, "GPU_QUERIES", queries)
    monkeypatch.setattr(attention_dispatch, "GPU_WIDTH", 32)
    monkeypatch.setattr(attention_dispatch, "QUERIES_STEP", 8)
    score = make_shared_scorer(vocab_size=96, gradients=True, packing=packing)
    with memory_efficient_training(model, recompute=recompute):
        found = scores_and_gradients(model, pairs, score)
    values = slice(0, 2)
    for ours, theirs in zip(found[values], expected[values], strict=True):
        assert mx.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert mx.linalg.norm(ours - theirs).item() <= 1e-4 * mx.linalg.norm(theirs).item()
