"""Which blocks stand for all of them, and that the model gets its own back."""

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from mlx_dpo.adapters.attach import attach_adapters, enable_full_fine_tuning
from mlx_dpo.profiling.layer_subset import (
    LayersNotFoundError,
    all_layers,
    first_trained_layer,
    layer_signature,
    sample_layers,
    with_layers,
)
from tests.conftest import make_llama
from tests.scoring.small_models import make


def make_deep(layers=9):
    return llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=32, num_hidden_layers=layers, intermediate_size=48,
            num_attention_heads=4, rms_norm_eps=1e-5, vocab_size=64,
        )
    )  # fmt: skip


def positions(model, blocks):
    at = {id(block): position for position, block in enumerate(model.layers)}
    return [at[id(block)] for block in blocks]


def test_of_equal_blocks_two_and_four_are_taken():
    model = make_deep()
    found = sample_layers(model)
    assert positions(model, found.small) == [0, 1]
    assert positions(model, found.large) == [0, 1, 2, 3]
    assert (found.count, found.is_whole) == (9, False)


def test_a_pattern_is_taken_whole_and_then_twice():
    model = make("qwen3_next")
    model.model.layers = [model.layers[i] for i in (0, 1)] * 1 + [model.layers[2]]
    assert layer_signature(model.layers[0]) != layer_signature(
        model.layers[1]
    )  # recurrent, then attention
    assert layer_signature(model.layers[0]) == layer_signature(model.layers[2])
    found = sample_layers(model)
    assert positions(model, found.small) == [0, 1]
    assert positions(model, found.large) == [0, 1, 2]
    assert found.is_whole


def test_a_first_block_of_its_own_kind_is_not_what_is_added():
    model = make_deep()
    model.layers[0].mlp.gate_proj.weight = mx.zeros((7, 32))
    found = sample_layers(model)
    assert positions(model, found.large)[2:] == [2, 3]


def test_a_kind_that_comes_late_is_not_left_out():
    model = make_deep()
    model.layers[6].mlp.gate_proj.weight = mx.zeros((7, 32))
    found = sample_layers(model)
    assert 6 in positions(model, found.small)
    assert found.is_whole


def test_windows_make_another_kind_and_positions_do_not():
    model = make_deep()
    model.layers[1].use_sliding = True
    model.layers[2].layer_idx = 2
    assert (
        layer_signature(model.layers[1])
        != layer_signature(model.layers[0])
        == layer_signature(model.layers[2])
    )


def test_adapters_make_no_other_kind():
    model = make_llama()
    before = layer_signature(model.layers[1])
    attach_adapters(model, rank=4, scale=1.0, dropout=0.1, num_layers=1)
    assert layer_signature(model.layers[1]) == layer_signature(model.layers[0]) == before


def test_only_blocks_with_adapters_stand_for_those_that_keep_something():
    model = make_deep()
    attach_adapters(model, rank=2, scale=1.0, num_layers=5)
    found = sample_layers(model)
    assert positions(model, found.large) == [4, 5, 6, 7]
    assert found.count == 5


def test_gradients_reach_every_block_below_which_something_is_trained():
    model = make_deep()
    attach_adapters(model, rank=2, scale=1.0, target_modules=["model.layers.6.mlp.up_proj"])
    assert first_trained_layer(model) == 6
    model = make_deep()
    attach_adapters(
        model, rank=2, scale=1.0, target_modules=["model.layers.6.mlp.up_proj", "embed_tokens"]
    )
    assert first_trained_layer(model) == 0
    model = make_deep()
    enable_full_fine_tuning(model, num_layers=2)
    assert (first_trained_layer(model), sample_layers(model).count) == (7, 2)
    assert first_trained_layer(make_deep().freeze()) == 9


def test_fewer_adapted_blocks_than_a_sample_are_all_taken():
    model = make_deep()
    attach_adapters(model, rank=2, scale=1.0, num_layers=1)
    found = sample_layers(model)
    assert positions(model, found.large) == [8]
    assert found.is_whole


def test_the_model_runs_on_some_blocks_and_gets_all_of_them_back():
    model = make_deep()
    tokens = mx.arange(6)[None]
    before, all_blocks = model(tokens), list(model.layers)
    with pytest.raises(ZeroDivisionError), with_layers(model, all_blocks[2:5]):
        assert positions(model, model.layers) == [0, 1, 2]
        shorter = model(tokens)
        1 / 0  # noqa: B018
    assert list(map(id, model.layers)) == list(map(id, all_blocks))
    assert mx.array_equal(model(tokens), before)
    assert not mx.allclose(shorter, before)


def test_a_model_that_makes_its_list_anew_is_not_cut():
    class Hidden(llama.Model):
        @property
        def layers(self):
            return [block for pair in self.model.halves for block in pair]

    model = make_deep()
    model.__class__ = Hidden
    blocks = model.model.pop("layers")
    model.model.halves = [blocks[:4], blocks[4:]]
    with pytest.raises(LayersNotFoundError), with_layers(model, model.layers[:2]):
        pass
    assert all_layers(model).is_whole
    with with_layers(model, model.layers):
        pass
