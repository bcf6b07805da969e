"""What a pass costs is what goes through the layers, and its size changes no value."""

import mlx.core as mx
import pytest

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.token_counts import padded_row_tokens
from mlx_dpo.scoring.score_pairs import score_pairs
from mlx_dpo.scoring.scorers import TOKEN_COUNTS, make_shared_scorer, plain_scorer
from mlx_dpo.scoring.select_scorer import select_scorer
from mlx_dpo.types import TokenizedPair
from tests.conftest import VOCAB, make_llama

SCORERS = {"plain": (plain_scorer, padded_row_tokens)} | {
    packing: (make_shared_scorer(vocab_size=VOCAB, gradients=False, packing=packing), cost)
    for packing, cost in TOKEN_COUNTS.items()
}


class Counting:
    """Wraps the embedding and counts what goes through the layers."""

    def __init__(self, embedding):
        self.embedding = embedding
        self.tokens = []

    def __call__(self, tokens):
        self.tokens.append(tokens.size)
        return self.embedding(tokens)

    def as_linear(self, hidden):
        return self.embedding.as_linear(hidden)


@pytest.fixture
def counted():
    model = make_llama()
    model.model.embed_tokens = counting = Counting(model.model.embed_tokens)
    return model, counting


def pair(prompt, chosen, rejected):
    ids = iter(range(1, VOCAB))
    return TokenizedPair(*(tuple(next(ids) for _ in range(n)) for n in (prompt, chosen, rejected)))


PASSES = [
    [pair(7, 5, 3)],
    [pair(7, 1, 1)],
    [pair(7, 2, 1), pair(7, 1, 1)],
    [pair(4, 5, 3), pair(9, 7, 1), pair(4, 3, 3)],
    [pair(1, 16, 17), pair(2, 2, 2), pair(3, 1, 9), pair(2, 1, 2)],
]


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("pairs", PASSES)
def test_the_cost_of_a_micro_batch_is_its_tokens_through_the_layers(counted, name, pairs):
    model, counting = counted
    scorer, cost = SCORERS[name]
    scorer(model, pairs)
    assert cost(pairs).total == sum(counting.tokens)


@pytest.mark.parametrize("wanted", ["plain", "shared"])
@pytest.mark.parametrize("packing", TOKEN_COUNTS)
def test_a_choice_counts_the_tokens_of_its_own_scorer(counted, wanted, packing):
    model, counting = counted
    choice = select_scorer(make_llama(), vocab_size=VOCAB, requested=wanted, packings=(packing,))
    for pairs in PASSES:
        counting.tokens.clear()
        choice.forward_only(model, pairs)
        assert choice.cost(pairs).total == sum(counting.tokens)


@pytest.mark.parametrize("name", SCORERS)
def test_micro_batches_are_filled_by_the_token_count_of_the_scorer_alone(name):
    scorer, cost = SCORERS[name]
    pairs = PASSES[4]
    for tokens, passes in ((cost(pairs).total, 1), (cost(pairs).total - 1, 2)):
        heard = []
        limit = PassLimit(tokens=tokens)
        score_pairs(
            make_llama(), pairs, limit=limit, scorer=scorer, cost=cost, progress=heard.append
        )
        assert (len(heard), sum(heard)) == (passes, len(pairs))


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("limit", [PassLimit(), PassLimit(pairs=3), PassLimit(tokens=40)])
def test_values_equal_those_of_single_pairs(counted, name, limit):
    model, counting = counted
    pairs = [pair for some in PASSES for pair in some]
    scorer, cost = SCORERS[name]
    expected = score_pairs(model, pairs, limit=PassLimit(pairs=1))
    counting.tokens.clear()
    result = score_pairs(model, pairs, limit=limit, scorer=scorer, cost=cost)
    assert mx.allclose(result.chosen, expected.chosen, atol=1e-4)
    assert mx.allclose(result.rejected, expected.rejected, atol=1e-4)
    assert len(counting.tokens) < 3 * len(pairs)


@pytest.mark.parametrize("at_once", [1024, 4])
def test_pairs_of_a_prompt_meet_in_a_pass_wherever_they_are(counted, monkeypatch, at_once):
    """Four pairs of each of three prompts, which alternate; the values keep the order of pairs."""
    monkeypatch.setattr("mlx_dpo.scoring.score_pairs.SORTED_PAIRS", at_once)
    model, counting = counted
    pairs = [
        TokenizedPair((7 - prompt,) * 6, (10 + answer, prompt + 1), (20 + answer, 3, 4))
        for answer in range(4)
        for prompt in range(3)
    ]
    scorer, cost = SCORERS["trie"]
    expected = score_pairs(model, pairs, limit=PassLimit(pairs=1))
    counting.tokens.clear()
    result = score_pairs(model, pairs, limit=PassLimit(pairs=4), scorer=scorer, cost=cost)
    assert counting.tokens == 3 * [6 + 4 * (1 + 2)]
    assert mx.allclose(result.chosen, expected.chosen, atol=1e-4)
    assert mx.allclose(result.rejected, expected.rejected, atol=1e-4)
