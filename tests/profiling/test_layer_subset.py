"""Layer samples, and that the model gets its own layers back."""

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from mlx_dpo.adapters.attach import attach_adapters, enable_full_fine_tuning
from mlx_dpo.profiling.layer_subset import (
    LayersNotFoundError,
    all_layers,
    choose_layer_subsets,
    first_trained_layer,
    layer_signature,
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


def indices(model, layers):
    by_id = {id(layer): index for index, layer in enumerate(model.layers)}
    return [by_id[id(layer)] for layer in layers]


def test_of_equal_layers_two_and_four_are_sampled():
    model = make_deep()
    result = choose_layer_subsets(model)
    assert indices(model, result.small) == [0, 1]
    assert indices(model, result.large) == [0, 1, 2, 3]
    assert (result.count, result.is_whole) == (9, False)


def test_a_repeating_pattern_is_sampled_once_and_twice():
    model = make("qwen3_next")
    model.model.layers = [model.layers[i] for i in (0, 1)] * 1 + [model.layers[2]]
    assert layer_signature(model.layers[0]) != layer_signature(
        model.layers[1]
    )  # recurrent, then attention
    assert layer_signature(model.layers[0]) == layer_signature(model.layers[2])
    result = choose_layer_subsets(model)
    assert indices(model, result.small) == [0, 1]
    assert indices(model, result.large) == [0, 1, 2]
    assert result.is_whole


def test_a_special_first_layer_is_sampled_once():
    model = make_deep()
    model.layers[0].mlp.gate_proj.weight = mx.zeros((7, 32))
    result = choose_layer_subsets(model)
    assert indices(model, result.large)[2:] == [2, 3]


def test_a_late_signature_is_sampled():
    model = make_deep()
    model.layers[6].mlp.gate_proj.weight = mx.zeros((7, 32))
    result = choose_layer_subsets(model)
    assert 6 in indices(model, result.small)
    assert result.is_whole


def test_windows_change_the_signature_and_indices_do_not():
    model = make_deep()
    model.layers[1].use_sliding = True
    model.layers[2].layer_idx = 2
    assert (
        layer_signature(model.layers[1])
        != layer_signature(model.layers[0])
        == layer_signature(model.layers[2])
    )


def test_adapters_do_not_change_the_signature():
    model = make_llama()
    before = layer_signature(model.layers[1])
    attach_adapters(model, rank=4, scale=1.0, dropout=0.1, num_layers=1)
    assert layer_signature(model.layers[1]) == layer_signature(model.layers[0]) == before


def test_only_trained_layers_are_sampled():
    model = make_deep()
    attach_adapters(model, rank=2, scale=1.0, num_layers=5)
    result = choose_layer_subsets(model)
    assert indices(model, result.large) == [4, 5, 6, 7]
    assert result.count == 5


def test_gradients_reach_every_layer_from_the_first_trained_one():
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
    assert (first_trained_layer(model), choose_layer_subsets(model).count) == (7, 2)
    assert first_trained_layer(make_deep().freeze()) == 9


def test_fewer_trained_layers_than_a_sample_are_all_sampled():
    model = make_deep()
    attach_adapters(model, rank=2, scale=1.0, num_layers=1)
    result = choose_layer_subsets(model)
    assert indices(model, result.large) == [8]
    assert result.is_whole


def test_the_model_runs_on_some_layers_and_is_restored():
    model = make_deep()
    tokens = mx.arange(6)[None]
    before, all_blocks = model(tokens), list(model.layers)
    with pytest.raises(ZeroDivisionError), with_layers(model, all_blocks[2:5]):
        assert indices(model, model.layers) == [0, 1, 2]
        shorter = model(tokens)
        1 / 0  # noqa: B018
    assert list(map(id, model.layers)) == list(map(id, all_blocks))
    assert mx.array_equal(model(tokens), before)
    assert not mx.allclose(shorter, before)


def test_a_model_without_a_list_of_layers_is_not_reduced():
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
