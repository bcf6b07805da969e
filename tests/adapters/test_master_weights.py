"""Float32 masters of a model's own weights: no small step is lost, and nothing else changes."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.master_weights import cast_for_forward, cast_permanently, forward_dtypes
from mlx_dpo.errors import ModelError
from mlx_dpo.scoring.scorers import memory_efficient_training, plain_scorer
from mlx_dpo.scoring.select_scorer import select_scorer
from tests.conftest import VOCAB, make_llama

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])


def full(dtype=mx.bfloat16, **settings):
    model = make_llama()
    model.set_dtype(dtype)
    adapters.enable_full_fine_tuning(model, **settings)
    return model


def test_only_the_blocks_are_trained_unless_more_is_named():
    names = adapters.adapter_weights(full()).keys()
    assert all(name.startswith("model.layers.") for name in names)
    assert len(names) == 2 * 9
    named = adapters.adapter_weights(full(target_modules=["embed_tokens", "mlp"], num_layers=1))
    mlp = {f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    assert named.keys() == mlp | {"model.embed_tokens.weight"}


def test_master_weights_are_float32_and_a_forward_pass_has_the_dtype_of_the_base(pairs):
    base = make_llama()
    base.set_dtype(mx.bfloat16)
    policy = full()
    assert {v.dtype for v in adapters.adapter_weights(policy).values()} == {mx.float32}
    assert forward_dtypes(policy) == {mx.bfloat16}
    for found, known in zip(plain_scorer(policy, pairs), plain_scorer(base, pairs), strict=True):
        assert mx.array_equal(found, known)
    with cast_for_forward(policy):
        assert policy(TOKENS).dtype == mx.bfloat16
    assert {v.dtype for v in adapters.adapter_weights(policy).values()} == {mx.float32}


def test_steps_smaller_than_the_resolution_of_bfloat16_add_up():
    policy = full(target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    start = adapters.adapter_weights(policy)[name]
    for _ in range(16):
        moved = {k: v * (1 + 2**-11) for k, v in adapters.adapter_weights(policy).items()}
        policy.load_weights(list(moved.items()), strict=False)
    with cast_for_forward(policy):
        seen = adapters.adapter_weights(policy)[name]
    assert not mx.array_equal(seen.astype(mx.float32), start)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gradients_of_the_shared_scorer_are_the_plain_ones(pairs, dtype, recompute):
    """With the embeddings, which are the head as well, and reach the masters in float32."""
    policy = full(dtype, target_modules=["embed_tokens", "self_attn", "input_layernorm"])
    before = {k: mx.array(v) for k, v in adapters.adapter_weights(policy).items()}

    def gradients(scorer):
        def total(model):
            return (scorer(model, pairs).chosen - 0.5 * scorer(model, pairs).rejected).sum()

        with memory_efficient_training(policy, recompute=recompute):
            found = nn.value_and_grad(policy, total)(policy)[1]
        mx.eval(found)
        return dict(nn.utils.tree_flatten(found))

    choice = select_scorer(policy, vocab_size=VOCAB)
    assert choice.name == "trie"
    plain, shared = gradients(plain_scorer), gradients(choice.scorer)
    limit = 1e-4 if dtype == mx.float32 else 5e-2
    for name, value in plain.items():
        assert value.dtype == shared[name].dtype == mx.float32
        assert mx.linalg.norm(value - shared[name]) < limit * mx.linalg.norm(value), name
    after = adapters.adapter_weights(policy)
    assert all(after[k].dtype == mx.float32 and mx.array_equal(after[k], before[k]) for k in before)


def test_a_policy_that_is_settled_has_the_bases_types():
    policy = full()
    with cast_for_forward(policy):
        expected = policy(TOKENS)
    cast_permanently(policy)
    assert mx.array_equal(policy(TOKENS), expected)
    assert forward_dtypes(policy) == set()


def test_packed_weights_are_refused():
    model = make_llama()
    nn.quantize(model, group_size=64, bits=4)
    with pytest.raises(ModelError, match=r"`model.layers.0.self_attn.q_proj` is quantized"):
        adapters.enable_full_fine_tuning(model)


def test_whole_numbers_stay_as_they_are():
    model = make_llama()
    model.layers[0].table = mx.arange(3)
    adapters.enable_full_fine_tuning(model)
    assert "model.layers.0.table" not in adapters.adapter_weights(model)
