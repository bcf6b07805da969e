"""Every way to adapt a model, scored the fast way: values and gradients are the plain ones."""

from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.scoring.scorers import memory_efficient_training, plain_scorer
from mlx_dpo.scoring.select_scorer import select_scorer
from mlx_dpo.types import TokenizedPair
from tests.scoring.small_models import MODELS, SIZES, VOCAB

PAIRS = [
    TokenizedPair((1, 2, 3), (10, 11, 3), (20,)),
    TokenizedPair((4, 7), (12, 13, 14, 15), (21, 22)),
    TokenizedPair((3, 3, 5, 6, 1), (19, 30, 31), (28, 1)),
]


def build(kind, *, tied, bits):
    module = import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    entries = {"model_type": kind, **SIZES, **MODELS[kind], "tie_word_embeddings": tied}
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 32}
    sizes["shared_expert_intermediate_size"] = 32
    model = module.Model(module.ModelArgs.from_dict(entries | sizes))
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    return model


def stirred(model):
    key = mx.random.key(9)
    for name, value in adapters.adapter_weights(model).items():
        key, own = mx.random.split(key)
        noise = 0.2 * mx.random.normal(value.shape, key=own)
        moved = value * (1 + noise) if name.endswith(".m") else value + noise
        model.load_weights([(name, moved)], strict=False)
    return model


def gradients(model, scorer, *, recompute):
    def total(model):
        logps = scorer(model, PAIRS)
        return (logps.chosen * mx.array([1.0, -2.0, 0.5])).sum() - 0.3 * logps.rejected.sum()

    with memory_efficient_training(model, recompute=recompute):
        value, result = nn.value_and_grad(model, total)(model)
    mx.eval(value, result)
    return value.item(), dict(tree_flatten(result))


HEAD = ("embed_tokens", "lm_head", "q_proj")


@pytest.mark.parametrize(
    ("kind", "tied", "bits", "settings"),
    [
        ("llama", True, None, {"kind": "dora"}),
        ("llama", False, 3, {"kind": "dora"}),
        ("llama", True, None, {"target_modules": HEAD[:1]}),
        ("llama", False, None, {"target_modules": HEAD}),
        ("llama", False, 4, {"target_modules": HEAD}),
        ("llama", True, None, {"kind": "dora", "target_modules": (HEAD[0], "up_proj")}),
        ("llama", False, None, {"kind": "dora", "target_modules": HEAD}),
        ("llama", True, None, {"target_modules": ("model.layers.1.mlp.up_proj",)}),
        ("qwen2_moe", True, None, {"target_modules": ("switch_mlp.up_proj", "down_proj")}),
        ("qwen2_moe", False, 4, {"target_modules": ("switch_mlp.gate_proj", "lm_head")}),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_shared_scorer_is_exact(kind, tied, bits, settings, recompute):
    model = build(kind, tied=tied, bits=bits)
    adapters.attach_adapters(model, rank=2, scale=2.0, seed=1, **settings)
    stirred(model)
    choice = select_scorer(model, vocab_size=VOCAB)
    assert choice.name == "trie", choice.reason
    value, plain = gradients(model, plain_scorer, recompute=False)
    result, shared = gradients(model, choice.scorer, recompute=recompute)
    assert result == pytest.approx(value, rel=1e-5)
    assert shared.keys() == plain.keys()
    largest = max(mx.linalg.norm(slope).item() for slope in plain.values())
    for name, slope in plain.items():
        size = mx.linalg.norm(slope).item()
        assert size > 0, name
        assert mx.linalg.norm(slope - shared[name]).item() < 1e-3 * max(size, largest / 100), name


def test_disabled_adapters_give_the_base_model_bit_for_bit():
    for kind, targets in (("lora", HEAD), ("dora", HEAD), ("dora", ())):
        model = build("llama", tied=False, bits=None)
        tokens = mx.array([[1, 2, 3, 4]])
        before = model(tokens)
        adapters.attach_adapters(model, rank=2, scale=2.0, kind=kind, target_modules=targets)
        adapted = stirred(model)(tokens)
        with adapters.disable_adapters(model):
            assert mx.array_equal(model(tokens), before)
        assert mx.array_equal(model(tokens), adapted)
        adapters.detach_adapters(model)
        assert mx.array_equal(model(tokens), before)
