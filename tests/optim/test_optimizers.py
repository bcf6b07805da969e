"""Each optimizer against its paper in float64, and its state through a checkpoint."""

import inspect
from functools import partial
from itertools import islice

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.optim.optimizers import OPTIMIZERS, build_optimizer, count_state_bytes, orthogonalize
from mlx_dpo.training import checkpoint
from mlx_dpo.training.loop import Progress, train
from tests.conftest import make_llama
from tests.training.test_loop import plan  # noqa: F401  (a fixture)

RATES = [3e-3, 1e-2, 8e-3, 2e-3, 1e-3]  # of five steps
DRAW = np.random.default_rng(0)
START = {"matrix": DRAW.normal(size=(6, 4)), "vector": DRAW.normal(size=5)}
GRADIENTS = [{name: DRAW.normal(size=x.shape) for name, x in START.items()} for _ in RATES]


# --- the papers, in float64 ----------------------------------------------------------------


def adam(x, gradients, *, b1=0.9, b2=0.999, eps=1e-8, decay=0.0):
    """Kingma & Ba, Algorithm 1; decay as Loshchilov & Hutter, Algorithm 2."""
    m = v = 0.0
    for t, (rate, g) in enumerate(zip(RATES, gradients, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        x = x - rate * (step + decay * x)
    return x


def adafactor(x, gradients, *, decay=0.0):
    """Shazeer & Stern, Algorithms 4 and 5, with a given rate: rows and columns, clipped at 1."""
    rows = columns = v = 0.0
    for t, (rate, g) in enumerate(zip(RATES, gradients, strict=True), start=1):
        b2 = 1 - t**-0.8
        square = g**2 + 1e-30
        if x.ndim == 1:
            v = b2 * v + (1 - b2) * square
        else:
            rows = b2 * rows + (1 - b2) * square.mean(axis=1)
            columns = b2 * columns + (1 - b2) * square.mean(axis=0)
            v = np.outer(rows, columns) / rows.mean()
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()))
        x = x - rate * (u + decay * x)
    return x


def lion(x, gradients, *, b1=0.9, b2=0.99, decay=0.0):
    """Chen et al., Algorithm 2."""
    m = 0.0
    for rate, g in zip(RATES, gradients, strict=True):
        x = x - rate * (np.sign(b1 * m + (1 - b1) * g) + decay * x)
        m = b2 * m + (1 - b2) * g
    return x


def rms_prop(x, gradients):
    v = 0.0
    for rate, g in zip(RATES, gradients, strict=True):
        v = 0.99 * v + 0.01 * g**2
        x = x - rate * g / (np.sqrt(v) + 1e-8)
    return x


def sgd(x, gradients, *, mu=0.0, decay=0.0):
    v = 0.0
    for rate, g in zip(RATES, gradients, strict=True):
        v = mu * v + g + decay * x
        x = x - rate * v
    return x


def muon(x, gradients, *, mu=0.95, decay=0.0):
    """Jordan et al. with the factor and the decay of Liu et al., Eq. 4."""
    v = np.zeros_like(x)
    for rate, g in zip(RATES, gradients, strict=True):
        v = mu * v + (1 - mu) * g
        u = (1 - mu) * g + mu * v
        u = u / (np.linalg.norm(u) + 1e-7)
        for _ in range(5):
            a = u @ u.T
            u = 3.4445 * u + (-4.7750 * a + 2.0315 * a @ a) @ u
        x = x - rate * (decay * x + 0.2 * max(x.shape) ** 0.5 * u)
    return x


CASES = [
    ("adamw", {}, adam),
    ("adamw", {"weight_decay": 0.3}, partial(adam, decay=0.3)),
    ("adamw", {"adam_beta1": 0.5, "adam_beta2": 0.8, "adam_epsilon": 0.1},
     partial(adam, b1=0.5, b2=0.8, eps=0.1)),
    ("adam", {}, adam),
    ("adam", {"adam_beta1": 0.5, "adam_beta2": 0.8, "adam_epsilon": 0.1},
     partial(adam, b1=0.5, b2=0.8, eps=0.1)),
    ("adafactor", {}, adafactor),
    ("adafactor", {"weight_decay": 0.3}, partial(adafactor, decay=0.3)),
    ("lion", {}, lion),
    ("lion", {"weight_decay": 0.3}, partial(lion, decay=0.3)),
    ("lion", {"adam_beta1": 0.5, "adam_beta2": 0.7}, partial(lion, b1=0.5, b2=0.7)),
    ("rmsprop", {}, rms_prop),
    ("sgd", {}, sgd),
    ("sgd", {"momentum": 0.9, "weight_decay": 0.3}, partial(sgd, mu=0.9, decay=0.3)),
]  # fmt: skip


class Weights(nn.Module):
    """A model with the same weights outside and inside a list of layers."""

    def __init__(self, start):
        super().__init__()
        for name, value in start.items():
            self[name] = mx.array(value, dtype=mx.float32)
        self.layers = [{name: mx.array(v, dtype=mx.float32) for name, v in start.items()}]


def five_steps(name, start=START, gradients=GRADIENTS, **settings):
    """Return the weights after five steps of the optimizer, inside and outside of a layer."""
    model = Weights(start)
    optimizer = build_optimizer(name, model, 99.0, **settings)
    for rate, g in zip(RATES, gradients, strict=True):
        g = {key: mx.array(value, dtype=mx.float32) for key, value in g.items()}
        optimizer.learning_rate = rate
        optimizer.update(model, g | {"layers": [g]})
    return named_arrays(model.parameters())


def assert_close(actual, expected):
    assert np.abs(np.array(actual, dtype=np.float64) - expected).max() < 1e-6


@pytest.mark.parametrize(("name", "settings", "paper"), CASES)
def test_five_steps_are_those_of_the_paper(name, settings, paper):
    actual = five_steps(name, **settings)
    for key, start in START.items():
        expected = paper(start, [g[key] for g in GRADIENTS])
        assert_close(actual[key], expected)
        assert_close(actual[f"layers.0.{key}"], expected)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3}, {"momentum": 0.6}])
def test_muon_updates_the_matrices_of_layers_and_adamw_the_rest(settings):
    actual = five_steps("muon", **settings)
    decay = settings.get("weight_decay", 0.0)
    expected_muon = partial(muon, mu=settings.get("momentum", 0.95), decay=decay)
    adamw = partial(adam, decay=decay)
    paths = {
        "layers.0.matrix": expected_muon,
        "layers.0.vector": adamw,  # as DoRA's magnitudes
        "matrix": adamw,  # as embeddings and head
        "vector": adamw,
    }
    for path, paper in paths.items():
        key = path.rpartition(".")[2]
        assert_close(actual[path], paper(START[key], [g[key] for g in GRADIENTS]))


def test_muon_is_independent_of_which_axis_of_a_matrix_is_the_output():
    """Adapters store the axes in the opposite order of weights."""
    transposed = five_steps(
        "muon",
        {"matrix": START["matrix"].T},
        [{"matrix": g["matrix"].T} for g in GRADIENTS],
        weight_decay=0.1,
    )
    straight = five_steps("muon", weight_decay=0.1)
    assert_close(transposed["layers.0.matrix"].T, np.array(straight["layers.0.matrix"]))


def test_stacked_matrices_are_made_orthogonal_one_by_one():
    stack = mx.random.normal((3, 8, 5), key=mx.random.key(0))
    together = orthogonalize(stack)
    for matrix, actual in zip(stack, together, strict=True):
        assert mx.allclose(orthogonalize(matrix), actual, atol=1e-6)
        sizes = np.linalg.svd(np.array(actual), compute_uv=False)
        assert ((sizes > 0.6) & (sizes < 1.3)).all()  # what five steps reach


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_weight_without_a_gradient_stays(name):
    """Half of every new adapter has no gradient at its first step: the other half is zero."""
    zeros = [{key: np.zeros_like(value) for key, value in START.items()} for _ in RATES]
    for key, value in five_steps(name, gradients=zeros).items():
        assert_close(value, START[key.rpartition(".")[2]])


def test_an_optimizer_takes_the_settings_of_its_entry():
    for name, entry in OPTIMIZERS.items():
        assert tuple(inspect.signature(entry.build).parameters)[1:] == entry.settings, name


def test_every_optimizer_is_compared_with_its_paper():
    """A new optimizer needs a row in `CASES`; Muon has a test of its own."""
    assert {name for name, *_ in CASES} | {"muon"} == OPTIMIZERS.keys()


# --- optimizer state ------------------------------------------------------------------------

SETTINGS = {"sgd": {"momentum": 0.9}, "adamw": {"weight_decay": 0.01}}


def fresh(name, kind="lora"):
    policy = make_llama()
    adapters.attach_adapters(
        policy, kind=kind, rank=4, scale=2.0, dropout=0.3, num_layers=1, seed=1
    )
    return policy, build_optimizer(name, policy, 1e-2, **SETTINGS.get(name, {}))


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "lora") for name in sorted(OPTIMIZERS)), ("muon", "dora")]
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(plan, tmp_path, name, kind):  # noqa: F811
    straight, optimizer = fresh(name, kind)
    expected = [row for _, row in train(straight, optimizer, plan, start=Progress())]

    stopped, optimizer = fresh(name, kind)
    steps = list(islice(train(stopped, optimizer, plan, start=Progress()), 3))
    rows = [row for _, row in steps]
    checkpoint.save(tmp_path, stopped, optimizer, steps[-1][0], {})
    mx.random.seed(999)

    resumed, again = fresh(name, kind)
    start = checkpoint.restore(checkpoint.latest(tmp_path), resumed, again)
    expected_state, actual = named_arrays(optimizer.state), named_arrays(again.state)
    assert expected_state.keys() == actual.keys()
    for key, value in expected_state.items():
        assert value.dtype == actual[key].dtype, key
        assert mx.array_equal(value, actual[key]), key
    rows += [row for _, row in train(resumed, again, plan, start=start)]
    assert rows == expected
    for key, value in adapters.adapter_weights(resumed).items():
        assert mx.array_equal(value, adapters.adapter_weights(straight)[key]), key


@pytest.mark.parametrize(
    ("name", "moments"), [("adamw", 2), ("adam", 2), ("lion", 1), ("muon", 1), ("sgd", 1),
                          ("rmsprop", 1)],
)  # fmt: skip
def test_the_state_is_counted_in_copies_of_the_trained_weights(name, moments):
    policy, optimizer = fresh(name)
    moved = sum(value.nbytes for value in adapters.adapter_weights(policy).values())
    assert count_state_bytes(optimizer) == moments * moved


def test_the_state_of_adafactor_is_rows_and_columns():
    policy, optimizer = fresh("adafactor")
    shapes = [value.shape for value in adapters.adapter_weights(policy).values()]
    assert count_state_bytes(optimizer) == 4 * sum(rows + columns for rows, columns in shapes)
