"""Profiles of a few layers against those of the whole model."""

import gc

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.config.loss import LossSettings
from mlx_dpo.io.arrays import named_arrays, random_state
from mlx_dpo.profiling import profile as profiling
from mlx_dpo.profiling.layer_subset import all_layers, with_layers
from mlx_dpo.profiling.memory import trainable_bytes
from mlx_dpo.profiling.profile import (
    PassProfile,
    TrainingPass,
    Usage,
    extrapolate_from_short_texts,
    profile_inference_pass,
    profile_training_pass,
    shorten_pairs,
)
from mlx_dpo.scoring.equivalence import random_pairs
from mlx_dpo.scoring.scorers import make_shared_scorer
from mlx_dpo.training.objective import Objective
from mlx_dpo.types import TokenizedPair

VOCAB = 512
ROOM = 4 * 10**9


@pytest.fixture
def policy():
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=64, num_hidden_layers=9, intermediate_size=192,
            num_attention_heads=4, rms_norm_eps=1e-5, vocab_size=VOCAB,
        )
    )  # fmt: skip
    attach_adapters(model, rank=4, scale=1.0, dropout=0.1)
    mx.eval(model.parameters())
    return model


def step(**changes):
    settings = {
        "scorer": make_shared_scorer(vocab_size=VOCAB, gradients=True, packing="lengths"),
        "objective": Objective(LossSettings(beta=0.1)),
        "accumulates": False,
    }
    return TrainingPass(**(settings | changes))


@pytest.fixture
def pairs():
    return random_pairs([(60, 30, 20)], VOCAB)


def test_the_policy_is_not_changed(policy, pairs):
    policy.eval()
    policy.layers[3].train()
    blocks, weights = list(map(id, policy.layers)), named_arrays(policy.parameters())
    modes = [module.training for module in policy.modules()]
    drawn = mx.array(random_state())
    profile_training_pass(policy, pairs, step(), memory=ROOM)
    assert list(map(id, policy.layers)) == blocks
    assert [module.training for module in policy.modules()] == modes
    assert mx.array_equal(random_state(), drawn)
    after = named_arrays(policy.parameters())
    assert after.keys() == weights.keys()
    assert all(mx.array_equal(after[name], value) for name, value in weights.items())


def test_the_extrapolated_profile_equals_that_of_all_layers(policy, pairs, monkeypatch):
    extrapolated = profile_training_pass(policy, pairs, step(), memory=ROOM)
    monkeypatch.setattr(profiling, "choose_layer_subsets", all_layers)
    whole = profile_training_pass(policy, pairs, step(), memory=ROOM)
    assert whole.num_layers == extrapolated.num_layers == 9
    assert extrapolated.bytes == pytest.approx(whole.bytes, rel=0.1)


def test_gradient_accumulation_adds_the_size_of_the_gradient(policy, pairs, monkeypatch):
    # How far MLX works ahead in two runs differs by more than this gradient weighs.
    measured = profile_training_pass(policy, pairs, step(), memory=ROOM)
    monkeypatch.setattr(profiling, "_profile_pass", lambda *_: measured)
    among = profile_training_pass(policy, pairs, step(accumulates=True), memory=ROOM)
    assert among.bytes - measured.bytes == trainable_bytes(policy)
    assert (among.per_layer, among.seconds) == (measured.per_layer, measured.seconds)


def test_only_layers_with_adapters_count(policy, pairs):
    every = profile_training_pass(policy, pairs, step(), memory=ROOM)
    with with_layers(policy, policy.layers[:6]):
        fewer = profile_training_pass(policy, pairs, step(), memory=ROOM)
    assert (every.num_layers, fewer.num_layers) == (9, 6)
    assert every.bytes - fewer.bytes == pytest.approx(3 * every.per_layer.bytes, rel=0.2)


def test_pairs_are_shortened_if_memory_is_limited(policy, pairs):
    long = random_pairs([(600, 200, 200)], VOCAB)
    lengths = []

    def watching(model, pairs):
        lengths.append(len(pairs[0].prompt))
        return step().scorer(model, pairs)

    room = mx.get_active_memory() + 8_000_000
    result = profile_training_pass(policy, long, step(scorer=watching), memory=room)
    assert max(lengths) == round(600 * result.text_share) < 600
    whole = profile_training_pass(policy, long, step(), memory=ROOM)
    assert whole.text_share == 1
    assert whole.bytes > 8_000_000  # it would indeed not have fitted
    assert result.bytes == pytest.approx(whole.bytes, rel=0.5)


def test_a_model_that_needs_all_layers_is_profiled_whole(policy, pairs):
    class Particular(llama.Model):
        def __call__(self, *args, **kwargs):
            if len(self.layers) != 9:
                raise ValueError("nine layers or none")
            return llama.Model.__call__(self, *args, **kwargs)

    policy.__class__ = Particular
    result = profile_training_pass(policy, pairs, step(), memory=ROOM)
    assert result.num_layers == 9
    assert result.bytes > 0


def test_shortened_texts_keep_two_tokens():
    pair = TokenizedPair(tuple(range(40)), tuple(range(9)), (7,))
    [short] = shorten_pairs([pair], 0.25)
    assert short == TokenizedPair(tuple(range(10)), (0, 1), (7,))


@pytest.mark.parametrize(
    ("constant", "linear", "quadratic", "low", "high"),
    [
        (0, 8, 0, 1.0, 1.0),
        (0, 8, 64, 1.0, 1.0),
        (0, 0, 64, 1.0, 1.0),
        (800, 8, 0, 1.0, 4.0),  # a constant part counts as if it grew
        (800, 8, 64, 0.9, 4.0),
    ],
)
def test_memory_of_long_texts_follows_from_short_ones(constant, linear, quadratic, low, high):
    pairs = [TokenizedPair((1,) * 800, (2,) * 400, (3,) * 400)]

    def measure(pairs):
        tokens = len(pairs[0])
        size = constant + linear * tokens + quadratic * tokens**2
        return PassProfile(fixed=Usage(size, 0), per_layer=Usage(0, 0), num_layers=1)

    expected = measure(pairs).bytes
    assert low * expected <= extrapolate_from_short_texts(measure, pairs) <= high * expected


def test_memory_is_unknown_if_not_even_short_texts_fit():
    def measure(pairs):
        return PassProfile(fixed=Usage(1, 0), per_layer=Usage(1, 0), num_layers=1, text_share=0.25)

    assert extrapolate_from_short_texts(measure, [TokenizedPair((1,), (2,), (3,))]) is None


def test_garbage_that_is_collected_meanwhile_does_not_count(policy, pairs):
    """Arrays in a reference cycle, which the last of the measured passes would free."""
    calls = []

    def score(pairs):
        calls.append(pairs)
        if len(calls) == 2 * count:
            gc.collect()
        return mx.ones((1000, 1000)) + 1

    count = -1  # calls of a profile
    clean = profile_inference_pass(policy, pairs, score, memory=ROOM).bytes
    count = len(calls)
    gc.disable()  # only `score` and what is tested collect
    try:
        cycle = [mx.zeros((3000, 1000))]
        cycle.append(cycle)
        mx.eval(cycle[0])
        del cycle
        found = profile_inference_pass(policy, pairs, score, memory=ROOM).bytes
    finally:
        gc.enable()
    assert found == clean >= 4_000_000
