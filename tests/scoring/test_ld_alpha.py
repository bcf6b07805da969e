"""LD-DPO: what is beyond the length of the shorter completion of a pair counts less."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.data.batches.collate import collate
from mlx_dpo.scoring import lm_head as head
from mlx_dpo.scoring.equivalence import relative_errors, value_error
from mlx_dpo.scoring.logps import pair_logps
from mlx_dpo.scoring.scorers import make_shared_scorer, plain_scorer
from mlx_dpo.scoring.select_scorer import PACKINGS, select_scorer
from mlx_dpo.types import TokenizedPair
from tests.conftest import VOCAB, make_llama

ALPHA = 0.3


@pytest.fixture
def policy():
    model = make_llama()
    adapters.attach_adapters(model, rank=4, scale=2.0)
    return model


def plain(model, pairs, alpha=ALPHA):
    return plain_scorer(model, pairs, ld_alpha=alpha)


def rows(scorer, pairs):
    return lambda model: mx.concatenate([*scorer(model, pairs)])[:, None]


def by_hand(model, prompt, completion, shorter):
    """Token by token in float64, each counted as its place wants it."""
    ids, total = [*prompt], 0.0
    for place, token in enumerate(completion):
        logits = np.array(model(mx.array([ids]))[0, -1], dtype=np.float64)
        shifted = logits - logits.max()
        logp = shifted[token] - math.log(np.exp(shifted).sum())
        total += logp if place < shorter else ALPHA * logp
        ids.append(token)
    return total


@pytest.mark.parametrize("packing", ["plain", *PACKINGS])
def test_it_equals_a_token_loop_in_float64(tiny_llama, pairs, packing):
    shared = make_shared_scorer(vocab_size=VOCAB, gradients=False, packing=packing, ld_alpha=ALPHA)
    result = plain(tiny_llama, pairs) if packing == "plain" else shared(tiny_llama, pairs)
    for i, pair in enumerate(pairs):
        shorter = min(len(pair.chosen), len(pair.rejected))
        for name in ("chosen", "rejected"):
            expected = by_hand(tiny_llama, pair.prompt, getattr(pair, name), shorter)
            assert getattr(result, name)[i].item() == pytest.approx(expected, abs=1e-4)


def test_tokens_beyond_the_shorter_completion_are_weighted(uniform, pairs):
    """Every token costs log(VOCAB): 4 against 2 tokens are 2 + 2 alpha, and 2."""
    logps = pair_logps(uniform, collate(pairs, pad_multiple=64), ld_alpha=ALPHA)
    assert (-logps.chosen / math.log(VOCAB)).tolist() == pytest.approx(
        [1 + ALPHA, 2 + 2 * ALPHA, 1, 2, 1 + 2 * ALPHA]
    )
    assert (-logps.rejected / math.log(VOCAB)).tolist() == pytest.approx(
        [1, 2, 1 + 2 * ALPHA, 2, 1]
    )


@pytest.mark.parametrize("saved", [None, 3 * VOCAB * 4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_shared_scorer_equals_the_plain_one_in_values_and_gradients(
    policy, pairs, packing, saved, monkeypatch
):
    if saved:
        monkeypatch.setattr(head, "LOGITS_BYTES_PER_CHUNK", saved)
    scorer = make_shared_scorer(vocab_size=VOCAB, gradients=True, packing=packing, ld_alpha=ALPHA)
    result = relative_errors(policy, rows(scorer, pairs), rows(plain, pairs))
    assert result.values <= 1e-5
    assert result.gradients <= 1e-4


@pytest.mark.parametrize("packing", ["plain", *PACKINGS])
def test_alpha_one_is_the_plain_sum_and_none_gives_the_same_bits(policy, pairs, packing):
    def scored(alpha):
        if packing == "plain":
            return plain(policy, pairs, alpha)
        shared = make_shared_scorer(
            vocab_size=VOCAB, gradients=False, packing=packing, ld_alpha=alpha
        )
        return shared(policy, pairs)

    for weighted, plain_sum in zip(scored(1.0), scored(None), strict=True):
        assert mx.allclose(weighted, plain_sum, atol=1e-5, rtol=0)
    whole = plain_scorer(policy, pairs)
    if packing == "plain":
        assert all(mx.array_equal(a, b) for a, b in zip(whole, scored(None), strict=True))


def test_pairs_of_equal_length_do_not_depend_on_alpha(policy):
    even = [TokenizedPair((1, 2), (3, 4, 5), (6, 7, 8)), TokenizedPair((9,), (3,), (4,))]
    for a, b in zip(plain(policy, even), plain_scorer(policy, even), strict=True):
        assert mx.allclose(a, b, atol=1e-6, rtol=0)


def test_order_and_batch_do_not_change_the_result(tiny_llama, pairs):
    together, backwards = plain(tiny_llama, pairs), plain(tiny_llama, pairs[::-1])
    for i, pair in enumerate(pairs):
        alone = plain(tiny_llama, [pair])
        for a, b, c in zip(together, backwards, alone, strict=True):
            assert a[i].item() == pytest.approx(b[-1 - i].item(), abs=1e-5)
            assert a[i].item() == pytest.approx(c[0].item(), abs=1e-5)


def test_the_selected_scorers_apply_alpha(policy, pairs):
    for wanted in ("trie", "shared", "plain"):
        choice = select_scorer(policy, vocab_size=VOCAB, requested=wanted, ld_alpha=ALPHA)
        assert choice.name == wanted
        for scorer in (choice.scorer, choice.forward_only):
            assert value_error(policy, rows(scorer, pairs), rows(plain, pairs)) <= 1e-5


def test_a_shared_scorer_without_alpha_is_rejected(policy, monkeypatch):
    monkeypatch.setattr(
        "mlx_dpo.scoring.scorers._sum_logps", lambda logps, shorter, ld_alpha: logps.sum()
    )
    choice = select_scorer(policy, vocab_size=VOCAB, ld_alpha=ALPHA)
    assert choice.name == "plain"
    assert "differ from the plain scorer's" in choice.reason
