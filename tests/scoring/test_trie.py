"""The packed prefix trie: tokens, masks and head rows by brute force, and equal log-probs."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.scoring import lm_head as head
from mlx_dpo.scoring.equivalence import relative_errors, value_error
from mlx_dpo.scoring.packing import trie
from mlx_dpo.scoring.packing.trie import TrieSequence
from mlx_dpo.scoring.scorers import (
    make_shared_log_weights,
    make_shared_scorer,
    memory_efficient_training,
    plain_log_weights,
    plain_scorer,
)
from mlx_dpo.types import TokenizedPair
from tests.conftest import VOCAB, make_llama
from tests.scoring.branching import branching_sets, texts
from tests.scoring.small_models import make

SETS = branching_sets(VOCAB)
# Several chunks, and gaps wide enough to be cut out.
LONG = [pair for pairs in branching_sets(VOCAB, scale=6).values() for pair in pairs]
sets = pytest.mark.parametrize("name", SETS)


def prefixes_in_order(sequence):
    """Return the prefix that each token ends, found by the walk's positions. (T,)"""
    ids, stack, found = sequence.tokens[0].tolist(), [], []
    for token, position in zip(ids, sequence.positions.tolist(), strict=True):
        stack = [*stack[:position], token]
        assert len(stack) == position + 1
        found.append(tuple(stack))
    return found


@sets
def test_a_row_has_each_distinct_prefix_once(name):
    found = prefixes_in_order(TrieSequence(SETS[name]))
    distinct = {text[: n + 1] for text in texts(SETS[name]) for n in range(len(text))}
    assert len(found) == len(distinct)
    assert set(found) == distinct


def visible(sequence, size, window=None):
    """Return the mask of the whole row, assembled from the chunks. (T, T)"""
    whole, at = np.zeros((len(sequence), len(sequence)), bool), 0
    for chunk in sequence.chunks(size, mx.float32, window):
        assert chunk.query_start == at < chunk.query_end <= at + size
        at = chunk.query_end
        hidden = np.array(chunk.mask)
        assert hidden.shape == (chunk.query_end - chunk.query_start, chunk.num_keys)
        assert set(np.unique(hidden)) <= {0.0, -np.inf}
        keys = np.concatenate([np.arange(*span) for span in chunk.key_ranges])
        assert len(set(keys)) == len(keys)
        whole[chunk.query_start : chunk.query_end, keys] = hidden == 0
        if chunk.is_causal:
            causal = np.tri(*hidden.shape, hidden.shape[1] - hidden.shape[0], dtype=bool)
            assert ((hidden == 0) == causal).all()
    assert at == len(sequence)
    return whole


@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize(("size", "gap"), [(1, 0), (3, 2), (64, 32), (10**6, 0)])
@sets
def test_a_token_sees_the_prefixes_of_its_own(name, size, gap, window, monkeypatch):
    monkeypatch.setattr(trie, "MAX_HIDDEN_KEYS", gap)
    sequence = TrieSequence(SETS[name])
    prefixes = prefixes_in_order(sequence)
    expected = [
        [
            query[: len(key)] == key and (window is None or len(query) - len(key) < window)
            for key in prefixes
        ]
        for query in prefixes
    ]
    assert visible(sequence, size, window).tolist() == expected


def test_keys_of_other_texts_are_not_computed():
    """One prompt with long completions: of each other one, only the prompt is seen."""
    prompt, completions = tuple(range(10)), [(n,) * 200 for n in range(20, 24)]
    pairs = [TokenizedPair(prompt, completions[n], completions[n + 1]) for n in range(3)]
    chunks = TrieSequence(pairs).chunks(64, mx.float32, None)
    keys = sum((chunk.query_end - chunk.query_start) * chunk.num_keys for chunk in chunks)
    alone = (10 + 199) * (10 + 199 + 64) / 2
    assert keys <= 4 * alone


@pytest.mark.parametrize("size", [64, 10**6])
def test_padding_is_a_text_of_its_own(size, monkeypatch):
    name = "mlx_dpo.scoring.packing.packed_sequence.padded_width"
    pairs = SETS["system prompt"]
    length = len(TrieSequence(pairs))
    monkeypatch.setattr(name, lambda length: length + 7)
    sequence = TrieSequence(pairs)
    assert len(sequence) == length + 7
    whole = visible(sequence, size)
    assert not whole[:length, length:].any()
    assert (whole[length:, length:] == np.tri(7, dtype=bool)).all()
    assert not whole[length:, :length].any()
    # One chunk if the row fits, and one more for the padding: not one per token.
    assert len(sequence.chunks(10**6, mx.float32, None)) == 2
    model = make_llama()
    tested = make_shared_scorer(vocab_size=VOCAB, gradients=False, packing="trie")
    assert value_error(model, logps(tested, pairs), logps(plain_scorer, pairs)) <= 1e-5


@sets
def test_head_rows_are_each_prefix_with_each_target_once(name):
    pairs = SETS[name]
    sequence = TrieSequence(pairs)
    prefixes = prefixes_in_order(sequence)
    rows = sequence.head_rows()
    computed = [
        (prefixes[index], target)
        for index, target in zip(rows.indices.tolist(), rows.targets.tolist(), strict=True)
    ]
    wanted = [
        (pair.prompt + completion[:n], token)
        for side in ("chosen", "rejected")
        for pair in pairs
        for completion in [getattr(pair, side)]
        for n, token in enumerate(completion)
    ]
    assert [computed[row] for row in rows.rows.tolist()] == wanted
    assert len(computed) == len(set(wanted))


def test_the_order_of_the_pairs_changes_no_value():
    """Not even in the last bit: row and chunks depend on the set of texts only."""
    model = make_llama()
    score = make_shared_scorer(vocab_size=VOCAB, gradients=False, packing="trie")
    pairs = [pair for pairs in SETS.values() for pair in pairs]
    order = np.random.default_rng(1).permutation(len(pairs)).tolist()
    for values, permuted in zip(
        score(model, pairs), score(model, [pairs[i] for i in order]), strict=True
    ):
        assert mx.array_equal(values[mx.array(order)], permuted)


def logps(scorer, pairs):
    """Log-probabilities as rows of one number. (2B, 1)"""
    return lambda model: mx.concatenate([*scorer(model, pairs)])[:, None]


@pytest.fixture
def policy():
    model = make_llama()
    adapters.attach_adapters(model, rank=4, scale=2.0)
    return model


@pytest.mark.parametrize(
    ("is_cpu", "saved_keys", "recompute", "ld_alpha"),
    [(True, 10**6, False, None), (True, 0, True, 0.3), (False, 0, False, None)],
    ids=["saved", "recomputed", "gpu's arithmetic"],
)
def test_it_equals_the_plain_scorer(policy, is_cpu, saved_keys, recompute, ld_alpha, monkeypatch):
    monkeypatch.setattr("mlx_dpo.scoring.kernels.attention.MAX_SAVED_KEYS", saved_keys)
    for module in ("kernels.attention", "kernels.softmax", "packing.trie"):
        monkeypatch.setattr(f"mlx_dpo.scoring.{module}.is_cpu", lambda: is_cpu)
    monkeypatch.setattr(head, "LOGITS_BYTES_PER_CHUNK", 50 * VOCAB * 4)
    pairs = LONG
    tested = make_shared_scorer(vocab_size=VOCAB, gradients=True, packing="trie", ld_alpha=ld_alpha)
    expected = logps(partial(plain_scorer, ld_alpha=ld_alpha), pairs)
    with memory_efficient_training(policy, recompute=recompute):
        result = relative_errors(policy, logps(tested, pairs), expected)
    assert result.values <= 1e-5
    assert result.gradients <= 1e-4


def test_a_trained_head_gets_the_gradient_of_every_use():
    """Tied embeddings: gradients come through the backbone, the head, and their common weight."""
    pairs = [pair for pairs in SETS.values() for pair in pairs]
    tested = make_shared_scorer(vocab_size=VOCAB, gradients=True, packing="trie")
    result = relative_errors(make_llama(), logps(tested, pairs), logps(plain_scorer, pairs))
    assert result.values <= 1e-5
    assert result.gradients <= 1e-4


@sets
def test_log_weights_are_those_of_whole_rows(name):
    tested = make_shared_log_weights(vocab_size=VOCAB, packing="trie")
    expected = logps(plain_log_weights, SETS[name])
    assert value_error(make_llama(), logps(tested, SETS[name]), expected) <= 1e-5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["gemma3_text", "mixtral"])
def test_windows_and_experts_are_exact(kind, recompute):
    """The windows are narrower than the prompts."""
    model = make(kind)
    vocab = model.args.vocab_size
    pairs = [pair for pairs in branching_sets(vocab, scale=2).values() for pair in pairs]
    tested = make_shared_scorer(vocab_size=vocab, gradients=True, packing="trie")
    with memory_efficient_training(model, recompute=recompute):
        result = relative_errors(model, logps(tested, pairs), logps(plain_scorer, pairs))
    assert result.values <= 1e-5
    assert result.gradients <= 1e-4


def test_mismatched_completions_behind_their_own_prompt_run_once(policy):
    """KTO borrows the completion of another example: the same text occurs twice in a pass."""
    rng = np.random.default_rng(2)
    prompts = [tuple(rng.integers(0, VOCAB, 6).tolist()) for _ in range(3)]
    answers = [tuple(rng.integers(0, VOCAB, 5).tolist()) for _ in range(3)]
    labelled = [
        TokenizedPair(prompts[0], answers[n], answers[(n + 1) % 3], desirable=n % 2 == 0)
        for n in range(3)
    ]
    assert len(TrieSequence(labelled)) == 6 + 3 * 4
    tested = make_shared_scorer(vocab_size=VOCAB, gradients=True, packing="trie")
    result = relative_errors(policy, logps(tested, labelled), logps(plain_scorer, labelled))
    assert result.values <= 1e-5
    assert result.gradients <= 1e-4
