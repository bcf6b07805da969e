"""WPO: how much a policy would write a completion itself."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dpo.config.training import PassLimit
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.scoring import lm_head as head
from mlx_dpo.scoring.equivalence import value_error
from mlx_dpo.scoring.score_pairs import on_policy_weights, score_pairs
from mlx_dpo.scoring.scorers import make_shared_log_weights, plain_log_weights
from mlx_dpo.scoring.select_scorer import PACKINGS, select_scorer
from mlx_dpo.types import TokenizedPair
from tests.conftest import VOCAB


def by_hand(model, prompt, completion):
    """The mean of log p(token) - log sum p², token by token in float64."""
    ids, result = [*prompt], []
    for token in completion:
        logits = np.array(model(mx.array([ids]))[0, -1], dtype=np.float64)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        result.append(np.log(p[token]) - np.log((p**2).sum()))
        ids.append(token)
    return np.mean(result)


def rows(scorer, pairs):
    return lambda model: mx.concatenate([*scorer(model, pairs)])[:, None]


def weights(model, pairs, scorer=plain_log_weights, size=2):
    def score(model, pairs):
        return score_pairs(model, pairs, limit=PassLimit(pairs=size), scorer=scorer)

    return on_policy_weights(model, pairs, score=score)


def test_it_equals_a_token_loop_in_float64(tiny_llama, pairs):
    result = plain_log_weights(tiny_llama, pairs)
    for i, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            expected = by_hand(tiny_llama, pair.prompt, getattr(pair, side))
            assert getattr(result, side)[i].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("chunk", [None, 3 * VOCAB * 4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_shared_prompts_give_the_same_weights(tiny_llama, pairs, packing, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(head, "LOGITS_BYTES_PER_CHUNK", chunk)
    shared = make_shared_log_weights(vocab_size=VOCAB, packing=packing)
    assert value_error(tiny_llama, rows(shared, pairs), rows(plain_log_weights, pairs)) <= 1e-5


def test_a_weight_is_the_product_over_both_completions(tiny_llama, pairs):
    expected = [
        np.exp(by_hand(tiny_llama, p.prompt, p.chosen) + by_hand(tiny_llama, p.prompt, p.rejected))
        for p in pairs
    ]
    for size in (1, 2, 5):
        assert weights(tiny_llama, pairs, size=size).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_uniform_policy_gives_weight_one(uniform):
    """All tokens are alike, so that each is as likely as what would be drawn."""
    result = plain_log_weights(uniform, [TokenizedPair((1,), (2, 3), (4,))])
    assert [part.item() for part in result] == pytest.approx([0, 0], abs=1e-5)


def test_the_selected_scorer_gives_log_weights(tiny_llama, pairs):
    expected = weights(tiny_llama, pairs)
    for wanted in ("shared", "plain"):
        choice = select_scorer(tiny_llama, vocab_size=VOCAB, requested=wanted)
        result = weights(tiny_llama, pairs, choice.log_weights)
        assert mx.allclose(result, expected, rtol=1e-4)


def test_no_gradient_flows_through_the_weights(tiny_llama, pairs):
    shared = make_shared_log_weights(vocab_size=VOCAB, packing="lengths")
    slope = nn.value_and_grad(tiny_llama, lambda m: sum(x.sum() for x in shared(m, pairs)))
    _, gradients = slope(tiny_llama)
    assert not any(mx.any(value).item() for value in named_arrays(gradients).values())
