"""Recomputed layers against plain ones: values, gradients, caches, random numbers, memory."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.scoring.kernels.attention_dispatch import use_chunked_attention
from mlx_dpo.scoring.kernels.gradient_checkpointing import gradient_checkpointing
from tests.scoring.small_models import (
    MODELS,
    SIZES,
    VOCAB,
    distance,
    loss_and_gradients,
    make,
    shared_prompt,
    weighted,
    whole,
)


@pytest.mark.parametrize("scores", [whole, shared_prompt])
@pytest.mark.parametrize("kind", MODELS)
def test_values_and_gradients_are_those_of_the_plain_layers(kind, scores):
    model = make(kind)
    loss, gradients = loss_and_gradients(model, scores)
    with gradient_checkpointing(model):
        again, ours = loss_and_gradients(model, scores)
    assert again == loss
    assert distance(ours, gradients) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next", "hunyuan"])
def test_values_and_gradients_are_right_with_chunked_attention(kind):
    model = make(kind)
    loss, gradients = loss_and_gradients(model, shared_prompt)
    with gradient_checkpointing(model), use_chunked_attention(32):
        again, ours = loss_and_gradients(model, shared_prompt)
    assert again == pytest.approx(loss, abs=2e-4)  # a sum of thousands that cancel
    assert distance(ours, gradients) < 1e-5


def test_every_adapter_gets_a_gradient():
    model = make("llama")
    with gradient_checkpointing(model):
        _, gradients = loss_and_gradients(model, shared_prompt)
    assert {name for name, value in gradients.items() if mx.abs(value).max().item() == 0} == set()
    assert gradients.keys() == dict(tree_flatten(model.trainable_parameters())).keys()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next", "falcon_h1"])
def test_caches_end_in_the_same_state(kind):
    model = make(kind)
    plain, ours = make_prompt_cache(model), make_prompt_cache(model)
    inner = [vars(cache).get("caches") for cache in ours]
    for tokens in ([1, 2, 3, 4, 5], [6], [7, 8]):
        expected = model(mx.array([tokens]), cache=plain)
        with gradient_checkpointing(model):
            assert mx.allclose(model(mx.array([tokens]), cache=ours), expected, atol=1e-5)
    for cache, other, parts in zip(ours, plain, inner, strict=True):
        assert_same_state(cache, other)
        for part, before in zip(vars(cache).get("caches", ()), parts or (), strict=True):
            assert part is before


def assert_same_state(ours, theirs):
    """Everything in two objects, and in the objects in them."""
    assert type(ours) is type(theirs)
    if isinstance(ours, mx.array):
        assert mx.allclose(ours, theirs, atol=1e-5)
    elif isinstance(ours, list | tuple):
        for item, other in zip(ours, theirs, strict=True):
            assert_same_state(item, other)
    elif hasattr(ours, "__dict__"):
        assert vars(ours).keys() == vars(theirs).keys()
        for name, value in vars(ours).items():
            assert_same_state(value, vars(theirs)[name])
    else:
        assert ours == theirs


def test_the_backward_pass_does_not_change_caches_and_parameters():
    model = make("llama")
    caches = make_prompt_cache(model)
    before = {name: id(value) for name, value in tree_flatten(model.layers[0].parameters())}

    def scores(model):
        first = weighted(model(mx.array([[1, 2, 3]]), cache=caches))
        return first + weighted(model(mx.array([[4, 5]]), cache=caches))

    with gradient_checkpointing(model):
        mx.eval(
            mx.grad(lambda x: weighted(model.layers[0](x, cache=caches[0])))(mx.ones((1, 3, 32)))
        )
        after = {name: id(value) for name, value in tree_flatten(model.layers[0].parameters())}
        assert after == before
        assert caches[0].offset == 3
        loss_and_gradients(model, scores)
    assert [cache.offset for cache in caches] == [8, 5, 5]


def test_dropout_uses_the_same_mask_in_the_recomputation():
    model = make("llama", dropout=0.5)
    mx.random.seed(11)
    loss, gradients = loss_and_gradients(model, shared_prompt)
    following = mx.random.uniform(shape=(3,)).tolist()
    with gradient_checkpointing(model):
        mx.random.seed(11)
        again, ours = loss_and_gradients(model, shared_prompt)
        assert again == pytest.approx(loss, rel=1e-5)
        assert distance(ours, gradients) < 1e-5
        assert mx.random.uniform(shape=(3,)).tolist() == following


def test_gradients_reach_the_input_and_a_learned_mask():
    layer = make("llama").layers[0]
    x, mask = mx.random.normal((1, 5, 32)), mx.random.normal((5, 5))

    def scores(x, mask):
        return weighted(layer(x, mask=mask))

    expected = mx.grad(scores, argnums=(0, 1))(x, mask)
    with gradient_checkpointing(layer, [layer]):
        result = mx.grad(scores, argnums=(0, 1))(x, mask)
    for ours, theirs in zip(result, expected, strict=True):
        assert mx.allclose(ours, theirs, atol=1e-5)


def test_other_models_of_the_same_class_are_not_changed():
    model, other = make("llama"), make("llama")
    kind, names = type(other.layers[0]), list(flat_names(model))
    with gradient_checkpointing(model):
        assert type(other.layers[0]) is kind
        assert isinstance(model.layers[0], kind) and type(model.layers[0]) is not kind
        assert type(model.layers[0]).__name__ == kind.__name__
        assert list(flat_names(model)) == names
    assert {type(layer) for layer in model.layers} == {kind}


def flat_names(model):
    return (name for name, _ in tree_flatten(model.parameters()))


def test_only_the_given_layers_are_checkpointed():
    model = make("llama")
    with gradient_checkpointing(model, model.layers[1:]):
        assert [type(layer) is llama.TransformerBlock for layer in model.layers] == [
            True,
            False,
            False,
        ]


def test_the_indices_of_called_layers_are_reported():
    model = make("llama")
    with gradient_checkpointing(model) as called:
        assert called == set()
        model.layers[1](mx.ones((1, 2, 32)))
        assert called == {1}
        model(mx.array([[1, 2]]))
        assert called == {0, 1, 2}


def test_an_array_returned_twice_gets_both_gradients():
    class Twice(nn.Module):
        def __call__(self, x):
            y = 3 * x
            return y, y

    layer, x = Twice(), mx.array([1.0])
    with gradient_checkpointing(layer, [layer]):
        assert mx.grad(lambda x: sum(part.sum() for part in layer(x)))(x).item() == 6


def test_blocks_do_not_nest_and_end_after_an_error():
    model = make("llama")
    with (
        pytest.raises(RuntimeError, match="checkpointed already"),
        gradient_checkpointing(model),
        gradient_checkpointing(model),
    ):
        pass
    assert type(model.layers[0]) is llama.TransformerBlock


def test_a_trainable_module_argument_is_rejected():
    class Borrows(nn.Module):
        def __call__(self, x, other):
            return other(x)

    layer = Borrows()
    with (
        gradient_checkpointing(layer, [layer]),
        pytest.raises(TypeError, match="`Linear` with trainable"),
    ):
        layer(mx.ones((1, 2)), nn.Linear(2, 2))


def test_a_cache_created_by_a_layer_is_returned():
    class Opens(nn.Module):
        def __call__(self, x):
            cache = KVCache()
            cache.update_and_fetch(2 * x, 3 * x)
            return x, cache

    def scores(layer, x):
        _, cache = layer(x)
        return weighted(cache.keys_and_values()[1])

    layer, x = Opens(), mx.ones((1, 1, 4, 2))
    expected = mx.grad(scores, argnums=1)(layer, x)
    with gradient_checkpointing(layer, [layer]):
        assert mx.allclose(mx.grad(scores, argnums=1)(layer, x), expected)


def peak(model, length):
    """Bytes beyond what is there, at most, in a forward and backward pass."""
    tokens = mx.arange(length)[None] % VOCAB
    mx.synchronize()
    before = mx.get_active_memory()
    peaks = []
    for _ in range(2):  # how far MLX runs ahead differs from time to time
        mx.reset_peak_memory()
        loss_and_gradients(model, lambda model: model(tokens).sum())
        peaks.append(mx.get_peak_memory() - before)
    return min(peaks)


def test_memory_is_linear_in_the_length():
    """Twice the tokens, at most 2.2 times the memory; without, attention alone makes it 3.5."""
    model = make("llama")
    with gradient_checkpointing(model), use_chunked_attention():
        assert peak(model, 2048) < 2.2 * peak(model, 1024)


def test_a_step_leaks_no_memory():
    model = make("qwen3_next")
    held = []
    for _ in range(3):
        with gradient_checkpointing(model), use_chunked_attention(32):
            loss_and_gradients(model, shared_prompt)
        held.append(mx.get_active_memory())
    assert held[1] == held[2]


def test_more_layers_cost_a_fraction_of_their_activations():
    """Layers keep their inputs of 64 floats a token, and not 256 of each of four products."""
    arguments = {"model_type": "llama", **SIZES, "hidden_size": 64, "intermediate_size": 256}
    plain, ours = [], []
    for layers in (4, 12):
        arguments["num_hidden_layers"] = layers
        model = llama.Model(llama.ModelArgs.from_dict(arguments))
        attach_adapters(model, rank=2, scale=2.0)
        mx.eval(model.parameters())
        plain.append(peak(model, 256))
        with gradient_checkpointing(model):
            ours.append(peak(model, 256))
    assert ours[1] - ours[0] < 0.1 * (plain[1] - plain[0])
