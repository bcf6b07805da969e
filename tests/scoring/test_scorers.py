"""The shared scorer against the plain one."""

import gc
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.scoring import lm_head as head
from mlx_dpo.scoring.equivalence import relative_errors, value_error
from mlx_dpo.scoring.kernels.attention_dispatch import use_chunked_attention
from mlx_dpo.scoring.kernels.gradient_checkpointing import gradient_checkpointing
from mlx_dpo.scoring.scorers import make_shared_scorer, memory_efficient_training, plain_scorer
from mlx_dpo.scoring.select_scorer import PACKINGS
from mlx_dpo.types import TokenizedPair
from tests.conftest import VOCAB, make_llama


@pytest.fixture
def policy():
    model = make_llama()
    adapters.attach_adapters(model, rank=4, scale=2.0)
    return model


def shared(*, gradients=True, packing="lengths"):
    return make_shared_scorer(vocab_size=VOCAB, gradients=gradients, packing=packing)


def rows(scorer, pairs):
    """Log-probabilities as rows of one number. (2B, 1)"""
    return lambda model: mx.concatenate([*scorer(model, pairs)])[:, None]


@contextmanager
def memory_savers(model, names):
    with ExitStack() as stack:
        stack.enter_context(memory_efficient_training(model, recompute=False))
        if "recomputed" in names:
            stack.enter_context(gradient_checkpointing(model))
        if "chunked" in names:
            stack.enter_context(use_chunked_attention(2))
        yield


@pytest.mark.parametrize("saved", [(), ("recomputed",), ("chunked",), ("recomputed", "chunked")])
@pytest.mark.parametrize("packing", PACKINGS)
def test_it_equals_the_plain_scorer(policy, pairs, packing, saved, monkeypatch):
    monkeypatch.setattr("mlx_dpo.scoring.kernels.attention_dispatch.MIN_SCORES", 0)
    monkeypatch.setattr(head, "LOGITS_BYTES_PER_CHUNK", 3 * VOCAB * 4)
    expected = rows(plain_scorer, pairs)
    with memory_savers(policy, saved):
        result = relative_errors(policy, rows(shared(packing=packing), pairs), expected)
    assert result.values <= 1e-5
    assert result.gradients <= 1e-4


@pytest.mark.parametrize("packing", PACKINGS)
def test_without_gradients_the_values_are_the_same(policy, pairs, packing):
    scorer = shared(gradients=False, packing=packing)
    assert value_error(policy, rows(scorer, pairs), rows(plain_scorer, pairs)) <= 1e-5


def test_every_weight_can_be_trained(pairs):
    """Tied embeddings: gradients come through the backbone, the head, and their common weight."""
    result = relative_errors(make_llama(), rows(shared(), pairs), rows(plain_scorer, pairs))
    assert result.values <= 1e-5
    assert result.gradients <= 1e-4


def test_pairs_keep_their_order(policy, pairs):
    """They are grouped by the length of their prompts: out of order, and back."""
    forward, backward = shared()(policy, pairs), shared()(policy, pairs[::-1])
    for scores, reversed_scores in zip(forward, backward, strict=True):
        assert mx.allclose(scores, reversed_scores[::-1], rtol=1e-5)


def test_bfloat16_is_as_accurate_as_the_plain_scorer(pairs):
    model = make_llama()
    truth = mx.concatenate([*plain_scorer(model, pairs)])
    model.set_dtype(mx.bfloat16)

    def error(scorer):
        return mx.abs(mx.concatenate([*scorer(model, pairs)]) - truth).mean().item()

    assert shared()(model, pairs).chosen.dtype == mx.float32
    assert error(shared()) <= 1.2 * error(plain_scorer)


class Counting(nn.Module):
    """A layer that adds up how many tokens pass."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.tokens = 0

    def __call__(self, x):
        self.tokens += x.shape[0] * x.shape[1]
        return self.layer(x)


@pytest.mark.parametrize("gradients", [False, True])
def test_no_token_runs_twice_and_only_completion_tokens_reach_the_head(policy, gradients):
    policy.args.tie_word_embeddings = False
    policy.model.norm = norm = Counting(policy.model.norm)
    policy.lm_head = logits = Counting(nn.Linear(64, VOCAB, bias=False))
    norm.freeze()
    logits.freeze()
    p, c, r = 20, 7, 5
    pair = TokenizedPair(tuple(range(p)), tuple(range(c)), tuple(range(r)))
    scorer = shared(gradients=gradients)

    def loss(model):
        scores = scorer(model, [pair])
        return (scores.chosen - scores.rejected).sum()

    mx.eval(nn.value_and_grad(policy, loss)(policy) if gradients else loss(policy))
    assert norm.tokens == p + c + r - 2
    assert logits.tokens == c + r


@pytest.mark.parametrize("packing", [None, *PACKINGS])
def test_fifty_lengths_leak_no_memory(policy, packing):
    """Kernels and traces that are kept for each length would pile up over a run."""
    scorer = shared(packing=packing) if packing else plain_scorer
    gradient = nn.value_and_grad(policy, lambda model, pairs: scorer(model, pairs).chosen.sum())
    held = {}
    for length in range(2, 53):
        prompt = tuple(1 + i % (VOCAB - 1) for i in range(length))
        with memory_efficient_training(policy, recompute=True):
            mx.eval(gradient(policy, [TokenizedPair(prompt, (1, 2, 3)[: 1 + length % 3], (3, 1))]))
        if length in (3, 52):
            gc.collect()  # a tenth of a second each time: not after every length
            held[length] = mx.get_active_memory()
    assert held[52] == held[3]
