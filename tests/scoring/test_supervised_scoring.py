"""Scores of examples without rejected completions, whose completions may have gaps."""

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.collate import collate
from mlx_dpo.data.batches.micro_batches import largest_micro_batch
from mlx_dpo.data.batches.token_counts import (
    packed_row_tokens,
    padded_row_tokens,
    shared_prompt_tokens,
    trie_tokens,
)
from mlx_dpo.models.load import load_model
from mlx_dpo.profiling.flops import count_trie_tokens
from mlx_dpo.scoring.packing.shared_prompts import SharedPromptSequence
from mlx_dpo.scoring.packing.trie import TrieSequence
from mlx_dpo.scoring.scorers import make_shared_scorer, plain_scorer
from mlx_dpo.types import TokenizedPair
from tests.checkpoints import make_checkpoint

PACKINGS = ["trie", "row", "batch", "lengths"]
TALK = TokenizedPair((1, 2, 3), (4, 5, 6, 7, 8, 9, 4), (), desirable=True, gaps=((1, 3), (4, 5)))
SHORT = TokenizedPair((1, 2), (9,), (), desirable=True)
SAME_BEGINNING = TokenizedPair((1, 2, 3), (4, 5, 6, 7, 1), (), desirable=True, gaps=((2, 4),))
ROWS = [TALK, SHORT, SAME_BEGINNING]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    make_checkpoint(folder)
    model = load_model(str(folder), dtype="float32").model
    attach_adapters(model, rank=2, scale=2.0)
    return model


@pytest.fixture(scope="module")
def vocab_size(model):
    return model(mx.array([[1]])).shape[-1]


def by_hand(model, row):
    """Log-prob and hits of a row, one token at a time, in float64."""
    text = [*row.prompt, *row.chosen]
    logits = np.array(model(mx.array([text]))[0].astype(mx.float32), np.float64)
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    inside = [i for i in range(len(row.chosen)) if not any(a <= i < b for a, b in row.gaps)]
    at = [(len(row.prompt) + i - 1, row.chosen[i]) for i in inside]
    return (
        sum(logps[place, token] for place, token in at),
        sum(logps[place].argmax() == token for place, token in at),
    )


def scorers(vocab_size, *, gradients):
    yield plain_scorer
    for packing in PACKINGS:
        yield make_shared_scorer(vocab_size=vocab_size, gradients=gradients, packing=packing)


def test_every_scorer_scores_exactly_the_tokens_outside_the_gaps(model, vocab_size):
    likely = greedy_row(model)
    rows = [*ROWS, likely]
    expected = [by_hand(model, row) for row in rows]
    assert expected[-1][1] == 3 and expected[0][1] < 4  # the second number tells them apart
    for gradients in (True, False):
        for score in scorers(vocab_size, gradients=gradients):
            found = score(model, rows)
            for index, column in enumerate((found.chosen, found.rejected)):
                assert column.tolist() == pytest.approx([e[index] for e in expected], abs=1e-4)


def greedy_row(model):
    """A row whose scored tokens are those that the model ranks first."""
    text = [1, 2]
    for _ in range(4):
        text.append(model(mx.array([text]))[0, -1].argmax().item())
    return TokenizedPair((1, 2), tuple(text[2:]), (), desirable=True, gaps=((1, 2),))


def test_every_scorer_has_the_same_gradients(model, vocab_size):
    weights = mx.array([1.0, -2.0, 0.5])

    def gradients(score):
        def loss(model):
            logps, hits = score(model, ROWS)
            return (weights * logps + 3 * hits).sum()  # hits have no gradient

        return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))

    expected, *others = map(gradients, scorers(vocab_size, gradients=True))
    assert max(mx.abs(value).max().item() for value in expected.values()) > 0.01
    for found in others:
        for name, value in expected.items():
            assert mx.allclose(found[name], value, rtol=1e-3, atol=1e-5), name


def test_tokens_in_a_gap_are_context(model):
    """They change the scores of later answers, and those after the last answer do not exist."""
    other = TokenizedPair(TALK.prompt, (4, 5, 1, 7, 8, 9, 4), (), gaps=TALK.gaps)
    first, second = plain_scorer(model, [TALK, other]).chosen.tolist()
    assert abs(first - second) > 1e-3


def test_nothing_is_computed_for_a_rejected_completion():
    tokens = sum(len(row.prompt) + len(row.chosen) - 1 for row in ROWS)
    width = collate(ROWS, pad_multiple=1).tokens.shape[1] - 1
    assert collate(ROWS).tokens.shape[0] == len(ROWS)
    assert padded_row_tokens(ROWS).total - padded_row_tokens(ROWS).padding == tokens
    assert padded_row_tokens(ROWS).total % len(ROWS) == 0 and width == 9
    assert packed_row_tokens(ROWS).total == len(SharedPromptSequence(ROWS)) == tokens
    shared = shared_prompt_tokens(ROWS, together=False)
    assert shared.total - shared.padding == tokens
    # The second row is the beginning of the others, and the third shares seven tokens.
    assert trie_tokens(ROWS).total == len(TrieSequence(ROWS)) == 9


def test_the_head_runs_on_scored_tokens_only():
    scored = sum(row.num_scored for row in ROWS)
    assert scored == 4 + 1 + 3
    assert len(SharedPromptSequence(ROWS).head_rows().targets) == scored
    head = TrieSequence(ROWS).head_rows()
    assert len(head.rows) == scored
    # The first token of two rows is the same prediction.
    assert len(head.targets) == count_trie_tokens([ROWS]).head_tokens == scored - 1


def test_the_largest_micro_batch_has_no_rejected_completions():
    for limit in (PassLimit(pairs=3), PassLimit(tokens=14)):
        for cost in (trie_tokens, packed_row_tokens):
            batch = largest_micro_batch(ROWS, limit, cost=cost)
            assert all(not row.rejected for row in batch)
            assert all(row.scored[-1] == len(row.chosen) - 1 for row in batch)
