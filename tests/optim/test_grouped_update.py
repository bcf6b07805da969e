"""Updates of grouped parameters against MLX's optimizers, which update one array after another."""

import io
import re
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map, tree_unflatten

from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.optim import grouped_update
from mlx_dpo.optim.grouped_update import GroupedUpdate, make_groups
from mlx_dpo.optim.optimizers import OPTIMIZERS, build_optimizer
from mlx_dpo.profiling.bench.shapes import SHAPES
from scripts.bench import kernels

VIEWS = {"Broadcast", "Copy", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze"}
VIEWS |= {"Transpose", "Unflatten"}

ELEMENTWISE = {"adamw", "adam", "lion", "sgd", "rmsprop"}

SETTINGS = {
    "adamw": {"weight_decay": 0.1},
    "adafactor": {"weight_decay": 0.1},
    "lion": {"weight_decay": 0.1},
    "muon": {"weight_decay": 0.1},
    "sgd": {"weight_decay": 0.1, "momentum": 0.9},
}
WIDTHS = ((24, 24), (24, 8), (24, 40))


def adapted_model(dtype, layers=3, widths=WIDTHS):
    """Layers with adapters of rank 4 and a vector; one matrix outside of the layers."""
    draw = np.random.default_rng(0)

    def array(*shape):
        return mx.array(draw.normal(size=shape)).astype(dtype)

    model = nn.Module()
    model.head = array(7, 5)
    model.layers = []
    for _ in range(layers):
        layer = nn.Module()
        for i, (inputs, outputs) in enumerate(widths):
            layer[f"linear{i}"] = nn.Module()
            layer[f"linear{i}"].lora_a = array(inputs, 4)
            layer[f"linear{i}"].lora_b = array(4, outputs)
        layer.norm = array(24)
        model.layers.append(layer)
    return model


def draw_gradients(model, seed, scale=0.1):
    draw = np.random.default_rng(seed)
    weights = named_arrays(model.trainable_parameters())
    return tree_unflatten(
        [
            (name, mx.array(scale * draw.normal(size=value.shape)).astype(value.dtype))
            for name, value in weights.items()
        ]
    )


def clip_each(gradients, max_norm):
    """Clip array by array, in float32, adding up the squares in the order of the tree."""
    squares = [mx.square(g.astype(mx.float32)).sum() for g in named_arrays(gradients).values()]
    norm = mx.sqrt(sum(squares, start=mx.array(0.0)))
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return tree_map(lambda g: (g.astype(mx.float32) * factor).astype(g.dtype), gradients), norm


def grouped_steps(model, optimizer, seeds, max_norm=0.5):
    update = GroupedUpdate(optimizer, model)
    norms = []
    for seed in seeds:
        weights = named_arrays(model.trainable_parameters())
        clipped, norm = update.clip(draw_gradients(model, seed), max_norm)
        optimizer.learning_rate = 1e-2 / (1 + seed)
        update.apply(model, weights, clipped)
        mx.eval(model.parameters(), optimizer.state)
        norms.append(norm.item())
    return norms


def single_steps(model, optimizer, seeds, max_norm=0.5):
    norms = []
    for seed in seeds:
        clipped, norm = clip_each(draw_gradients(model, seed), max_norm)
        optimizer.learning_rate = 1e-2 / (1 + seed)
        optimizer.update(model, clipped)
        mx.eval(model.parameters(), optimizer.state)
        norms.append(norm.item())
    return norms


def assert_same(ours, theirs):
    ours, theirs = named_arrays(ours), named_arrays(theirs)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert mx.array_equal(ours[name], value), name


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_grouped_update_equals_one_array_after_another_bit_for_bit(name, dtype):
    """Weights, state and norms, over steps with several rates; some steps clip, some do not."""
    ours, theirs = adapted_model(dtype), adapted_model(dtype)
    settings = SETTINGS.get(name, {})
    first = build_optimizer(name, ours, 1e-2, **settings)
    second = build_optimizer(name, theirs, 1e-2, **settings)
    assert grouped_steps(ours, first, range(4)) == single_steps(theirs, second, range(4))
    assert_same(ours.parameters(), theirs.parameters())
    assert_same(first.state, second.state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_single_updates_continues_in_groups(name):
    """As from a checkpoint: the tree of the state is MLX's own, in both directions."""
    ours, theirs = adapted_model(mx.float32), adapted_model(mx.float32)
    second = build_optimizer(name, theirs, 1e-2)
    single_steps(theirs, second, range(2))
    ours.update(tree_unflatten(list(named_arrays(theirs.parameters()).items())))
    first = build_optimizer(name, ours, 1e-2)
    first.state = tree_unflatten(
        [(key, mx.array(value)) for key, value in named_arrays(second.state).items()]
    )
    grouped_steps(ours, first, range(2, 4))
    single_steps(theirs, second, range(2, 4))
    assert_same(ours.parameters(), theirs.parameters())
    assert_same(first.state, second.state)


def test_weights_that_something_else_changed_are_packed_again():
    """A packed copy of the last update must not hide weights or state that were replaced."""
    ours, theirs = adapted_model(mx.float32), adapted_model(mx.float32)
    first, second = build_optimizer("adam", ours, 1e-2), build_optimizer("adam", theirs, 1e-2)
    update = GroupedUpdate(first, ours)
    for seed in range(3):
        for model, optimizer in ((ours, first), (theirs, second)):
            model.layers[1].norm = mx.full((24,), float(seed))
            optimizer.state["head"]["v"] = mx.full((7, 5), 0.5 + seed)
        weights = named_arrays(ours.trainable_parameters())
        update.apply(ours, weights, update.clip(draw_gradients(ours, seed), 0.0)[0])
        second.update(theirs, draw_gradients(theirs, seed))
    assert_same(ours.parameters(), theirs.parameters())


def test_large_parameters_are_updated_alone(monkeypatch):
    """Packing takes a copy, which only small parameters are worth; groups have a limit as well."""
    model = adapted_model(mx.float32)
    weights = named_arrays(model.trainable_parameters())
    optimizer = build_optimizer("adam", model, 1e-2)
    assert len(make_groups(optimizer, weights)) == 1
    monkeypatch.setattr(grouped_update, "MAX_PACKED_NUMBERS", 100)
    alone = [group.names for group in make_groups(optimizer, weights) if len(group.names) == 1]
    assert [(name,) for name, value in weights.items() if value.size > 100] == alone
    monkeypatch.setattr(grouped_update, "MAX_GROUP_NUMBERS", 200)
    for group in make_groups(optimizer, weights):
        assert len(group.names) == 1 or sum(weights[n].size for n in group.names) <= 300


def count_kernels(tree):
    """Count the kernels of a graph: one per operation, and one per input of a concatenation."""
    file = io.StringIO()
    mx.export_to_dot(file, *named_arrays(tree).values())
    kinds = dict(re.findall(r'\{ (\d+) \[label ="(\w+)"', file.getvalue()))
    inputs = re.findall(r'"\w+" -> (\d+)', file.getvalue())
    joined = sum(kinds[node] == "Concatenate" for node in inputs)
    others = [kind for kind in kinds.values() if kind not in VIEWS and kind != "Concatenate"]
    return len(others) + joined


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_420_adapters_takes_few_kernels(name):
    """As counted for a GPU, where each packed gradient is copied by a kernel of its own."""
    widths = ((24, 24), (24, 8), (24, 8), (24, 24), (24, 40), (24, 40), (40, 24))
    model = adapted_model(mx.float32, layers=30, widths=widths)
    for layer in model.layers:
        layer.freeze(keys="norm", recurse=False)
    model.freeze(keys="head", recurse=False)
    optimizer = build_optimizer(name, model, 1e-2)
    assert len(named_arrays(model.trainable_parameters())) == 420
    grouped_steps(model, optimizer, [0])
    update = GroupedUpdate(optimizer, model)
    counts = []
    for seed in (1, 2):
        weights = named_arrays(model.trainable_parameters())
        gradients = draw_gradients(model, seed)
        mx.eval(gradients)
        clipped, norm = update.clip(gradients, 0.5)
        update.apply(model, weights, clipped)
        counts.append(count_kernels([norm, model.trainable_parameters(), optimizer.state]))
        mx.eval(model.trainable_parameters(), optimizer.state)
    # Weights and state were packed by the update before.
    assert counts[1] <= (600 if name in ELEMENTWISE else 1000)


def test_the_kernels_of_an_update_grow_by_one_with_each_adapter():
    """The copy of its gradient into the group; everything else is as much for all of them."""
    few, many = (SHAPES["tiny"], replace(SHAPES["tiny"], num_hidden_layers=4))
    adapters = 2 * 7  # in a layer
    assert kernels.update_kernels(few) - 2 * adapters == kernels.update_kernels(many) - 4 * adapters


def test_clipping_bounds_the_global_norm_and_says_what_it_was():
    clipped, norm = clip({"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}, 1.0)
    assert norm.item() == 5.0
    assert clipped["a"].tolist() == pytest.approx([0.6, 0.0], abs=1e-5)
    assert clipped["b"].item() == pytest.approx(0.8, abs=1e-5)


def test_the_norm_of_large_gradients_is_exact():
    """As in full fine-tuning: added up one after the other, their squares lose the small ones."""
    draw = np.random.default_rng(0)
    shapes = {"alone": (1024, 2048), "a": (512, 512), "b": (256, 1024), "small": (64,)}
    grads = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    expected = sum((value.astype(np.float64) ** 2).sum() for value in grads.values()) ** 0.5
    _, norm = clip({name: mx.array(value) for name, value in grads.items()}, 0.0)
    assert norm.item() == pytest.approx(expected, rel=2e-6)
    for name, value in grads.items():
        _, own = clip({"x": mx.array(value), "y": mx.array(value)}, 0.0)
        assert own.item() == pytest.approx(
            2**0.5 * np.linalg.norm(value.astype(np.float64)), rel=2e-6
        ), name


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bit_gradients_are_measured_and_clipped_in_float32(dtype):
    """Squares of 40 000 overflow float16, and 4 096 ones added up in bfloat16 stay at 256."""
    grads = {"a": mx.full((4096,), 1.0, dtype), "b": mx.array([40000.0, -40000.0], dtype)}
    large = 39936.0 if dtype == mx.bfloat16 else 40000.0  # as the type holds it
    expected = (4096 + 2 * large**2) ** 0.5
    clipped, norm = clip(grads, 100.0)
    assert norm.dtype == mx.float32
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    assert {value.dtype for value in clipped.values()} == {dtype}
    assert clipped["b"].tolist() == pytest.approx([70.7, -70.7], rel=5e-3)
    assert clip({"a": grads["a"]}, 0.0)[1].item() == 64.0


@pytest.mark.parametrize("bound", [0.0, 10.0])
def test_without_a_bound_or_below_it_nothing_is_clipped(bound):
    clipped, norm = clip({"a": mx.array([3.0, 4.0])}, bound)
    assert norm.item() == 5.0
    assert clipped["a"].tolist() == [3.0, 4.0]


def clip(gradients, max_norm):
    """Return the clipped gradients by name, and the norm."""
    model = nn.Module()
    model.update(gradients, strict=False)
    for name, value in gradients.items():
        model[name] = value
    update = GroupedUpdate(build_optimizer("sgd", model, 1e-2), model)
    packed, norm = update.clip(gradients, max_norm)
    clipped = {}
    for group, gradient in packed:
        clipped.update(zip(group.names, group.unpack(gradient), strict=True))
    return clipped, norm
