"""Log-probs as scored are those of generation: else the model is changed, or refused."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from mlx_dpo.adapters.attach import adapted_layers, attach_adapters
from mlx_dpo.errors import ModelError
from mlx_dpo.scoring.equivalence import random_pairs, relative_errors
from mlx_dpo.scoring.generation_match import (
    NotComparableError,
    computes_with_caches,
    match_generation,
)
from mlx_dpo.scoring.scorers import memory_efficient_training, plain_scorer
from mlx_dpo.scoring.select_scorer import select_scorer
from tests.conftest import VOCAB, make_llama
from tests.scoring import architectures
from tests.scoring.architectures import build


def planted(model=None, make_cache=None, **members):
    """A small llama with another `__call__` or other caches."""
    model = model or make_llama()
    if make_cache is not None:
        members["make_cache"] = make_cache
    model.__class__ = type("Model", (llama.Model,), members)
    return model


def other_without_caches(self, tokens, cache=None):
    """Another function without caches: it does not see the first token."""
    if cache is None:
        return llama.Model.__call__(self, mx.concatenate([tokens[:, :1] * 0, tokens[:, 1:]], 1))
    return llama.Model.__call__(self, tokens, cache=cache)


def other_in_steps(self, tokens, cache=None):
    """Another function for one token than for several, as if decoding had a bug."""
    logits = llama.Model.__call__(self, tokens, cache=cache)
    return logits if tokens.shape[1] > 1 else logits * 1.01


def generated_logps(model, pair):
    """Sum of the log-probs that mlx-lm's own generation gives each completion."""
    sums = []
    for completion in (pair.chosen, pair.rejected):
        forced, total = iter(completion), 0.0
        steps = generate_step(
            mx.array(pair.prompt),
            model,
            max_tokens=len(completion),
            sampler=lambda logprobs, forced=forced: mx.array([next(forced, 0)]),
        )
        for token, logprobs in steps:
            total += logprobs[int(token)].item()
        sums.append(total)
    return np.array(sums)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_sound_model_is_left_as_it_is(dtype):
    model = make_llama()
    model.set_dtype(dtype)
    kind = type(model)
    match = match_generation(model, vocab_size=VOCAB)
    assert not match.uses_caches
    assert match.difference < (1e-5 if dtype == mx.float32 else 0.1)
    assert type(model) is kind


def test_a_model_that_needs_caches_gets_them_in_each_pass():
    model = planted(__call__=other_without_caches)
    match = match_generation(model, vocab_size=VOCAB)
    assert match.uses_caches
    assert match.difference < 1e-5 < 0.01 < match.uncached_difference
    tokens = mx.array([[5, 7, 1, 9]])
    expected = llama.Model.__call__(model, tokens)
    assert mx.array_equal(model(tokens), expected)
    assert mx.array_equal(model(tokens), model(tokens))  # each pass has new caches
    again = match_generation(model, vocab_size=VOCAB)
    assert again.uses_caches and again.difference < 1e-5
    assert again.uncached_difference == match.uncached_difference > 0.01


def test_a_model_without_an_agreeing_pass_is_refused_in_one_line():
    model = planted(__call__=other_in_steps)
    kind = type(model)
    with pytest.raises(
        ModelError,
        match=r"differ from those of token-by-token generation .by up to .* nats per token",
    ) as caught:
        match_generation(model, vocab_size=VOCAB)
    assert "\n" not in str(caught.value)
    assert type(model) is kind and not computes_with_caches(model)


def test_a_small_difference_in_float32_is_seen():
    """A tenth of a percent of the logits; in bfloat16 it would be rounding."""

    def slightly_other(self, tokens, cache=None):
        logits = llama.Model.__call__(self, tokens, cache=cache)
        return logits if tokens.shape[1] > 1 else logits * 1.001

    with pytest.raises(ModelError):
        match_generation(planted(__call__=slightly_other), vocab_size=VOCAB)


def test_a_window_is_tested_only_if_sequences_reach_past_it():
    """The caches of this model lose tokens that its mask still shows."""

    class Narrow(RotatingKVCache):
        def make_mask(self, length, **more):
            more["window_size"] = None
            return "causal" if length > 1 else None

    def make_cache(self):
        return [Narrow(20) for _ in self.layers]

    match = match_generation(planted(make_cache=make_cache), vocab_size=VOCAB, max_length=20)
    assert match.difference < 1e-5
    with pytest.raises(ModelError, match=r"sliding window of 20 tokens .*; use --max-length 20"):
        match_generation(planted(make_cache=make_cache), vocab_size=VOCAB, max_length=21)


def test_the_window_of_plamo3_is_another_one_in_generation(monkeypatch):
    monkeypatch.setitem(architectures.SMALL, "sliding_window", 16)
    with pytest.raises(ModelError, match="a sequence longer than its sliding window of 16 tokens"):
        match_generation(build("plamo3"), vocab_size=architectures.VOCAB)


def test_a_model_without_caches_cannot_be_compared():
    def make_cache(self):
        raise NotImplementedError("no cache for this one")

    model = planted(make_cache=make_cache)
    with pytest.raises(NotComparableError, match="no cache for this one"):
        match_generation(model, vocab_size=VOCAB)


# gemma3n: without caches, the last layers do not use the keys and values of the earlier ones


@pytest.fixture(scope="module")
def gemma3n():
    model = build("gemma3n")
    attach_adapters(model, rank=2, scale=2.0)  # its default targets
    return model, select_scorer(model, vocab_size=architectures.VOCAB, packings=("lengths",))


def test_layers_whose_weight_the_model_reads_get_no_adapter(gemma3n):
    names = {path.rpartition(".")[2] for path in adapted_layers(gemma3n[0])}
    assert not names & {"prediction_coefs", "correction_coefs"}
    assert {"q_proj", "o_proj", "gate_proj", "linear_left", "per_layer_projection"} <= names


def test_both_scorers_give_the_log_probs_of_mlx_lms_generation(gemma3n):
    model, choice = gemma3n
    assert choice.name == "shared" and choice.generation.uses_caches
    assert "without them this model's log-probs differ from generation" in choice.reason
    # Uneven lengths: the plain scorer pads them, and both go past the window of four tokens.
    pairs = random_pairs([(9, 6, 2), (5, 3, 4)], architectures.VOCAB)
    model.eval()
    expected = np.stack([generated_logps(model, pair) for pair in pairs])
    for scorer in (choice.forward_only, choice.scorer, plain_scorer):
        np.testing.assert_allclose(np.stack(scorer(model, pairs), axis=1), expected, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_passes_with_caches(gemma3n, recompute):
    model, choice = gemma3n
    pairs = random_pairs([(9, 6, 2), (5, 3, 4)], architectures.VOCAB)

    def plain(model):
        return mx.concatenate([*plain_scorer(model, pairs)])[:, None]

    def alone(model):
        """The definition, one sequence at a time, with mlx-lm's own caches."""
        sums = []
        for completion in ("chosen", "rejected"):
            for pair in pairs:
                target = getattr(pair, completion)
                tokens = mx.array([pair.prompt + target])
                logits = model(tokens[:, :-1], cache=make_prompt_cache(model))
                logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                chosen = mx.take_along_axis(logps, tokens[:, 1:, None], axis=-1)
                sums.append(chosen[0, -len(target) :].sum())
        return mx.stack(sums)[:, None]

    def shared(model):
        return mx.concatenate([*choice.scorer(model, pairs)])[:, None]

    for scorer in (plain, shared):
        with memory_efficient_training(model, recompute=recompute):
            errors = relative_errors(model, scorer, alone)
        assert errors.values < 1e-5
        assert errors.gradients < 1e-4
