"""Packed rows: positions, masks, and equality with whole rows."""

from contextlib import ExitStack

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.scoring.equivalence import relative_errors
from mlx_dpo.scoring.kernels.attention_dispatch import CPU_QUERIES, use_chunked_attention
from mlx_dpo.scoring.kernels.rope import use_token_positions
from mlx_dpo.scoring.packing.packed_sequence import PackedCache, PackedMask
from mlx_dpo.scoring.packing.shared_prompts import SharedPromptSequence
from mlx_dpo.scoring.scorers import make_shared_scorer, memory_efficient_training, plain_scorer
from mlx_dpo.types import TokenizedPair
from tests.conftest import VOCAB, make_llama

# prompt 0 1 2, chosen 3 4 (5), rejected 6 (7); then prompt 8, chosen (9), rejected 10 11 (12)
TWO = [
    TokenizedPair((0, 1, 2), (3, 4, 5), (6, 7)),
    TokenizedPair((8,), (9,), (10, 11, 12)),
]


def test_the_last_tokens_of_completions_are_left_out():
    assert SharedPromptSequence(TWO).tokens.tolist() == [[0, 1, 2, 3, 4, 6, 8, 10, 11]]


def test_both_completions_follow_the_prompt():
    assert SharedPromptSequence(TWO).positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]


def test_each_token_is_predicted_by_the_previous_one_of_its_text():
    chosen, rejected = [2, 3, 4, 6], [2, 5, 6, 7, 8]  # 3 4 5 and 9; 6 7 and 10 11 12
    assert SharedPromptSequence(TWO).head_rows().indices.tolist() == [*chosen, *rejected]


def visible(row, size, window=None):
    """Return the mask of the whole row, assembled from the chunks. (T, T)"""
    whole = np.zeros((len(row), len(row)), bool)
    at = 0
    for chunk in row.chunks(size, mx.float32, window):
        assert chunk.query_start == at
        at = chunk.query_end
        hidden = np.array(chunk.mask)
        assert set(np.unique(hidden)) <= {0.0, -np.inf}
        keys = np.concatenate([np.arange(*span) for span in chunk.key_ranges])
        whole[chunk.query_start : chunk.query_end, keys] = hidden == 0
    assert at == len(row)
    return whole


SEEN = [
    "x........",
    "xx.......",
    "xxx......",
    "xxxx.....",
    "xxxxx....",
    "xxx..x...",
    "......x..",
    "......xx.",
    "......xxx",
]


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_a_token_attends_to_its_prompt_and_completion_up_to_itself(size):
    expected = [[mark == "x" for mark in row] for row in SEEN]
    assert visible(SharedPromptSequence(TWO), size).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 64])
def test_a_sliding_window_counts_positions(size):
    """The rejected completion's first token stands fifth, and is the fourth of its text."""
    row = SharedPromptSequence(TWO)
    near = row.positions[:, None] - row.positions[None] < 2
    assert (visible(row, size, 2) == visible(row, size) & near).all()
    assert visible(row, size, 2)[5].nonzero()[0].tolist() == [2, 5]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROTATIONS = {
    "plain": nn.RoPE(8),
    "traditional": nn.RoPE(8, traditional=True, base=500.0),
    "partial": nn.RoPE(4, scale=0.5),
    "llama3": initialize_rope(8, 10000.0, False, LLAMA3, 64),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_every_token_is_rotated_by_its_position_in_its_text(name):
    rope = ROTATIONS[name]
    mx.random.seed(0)
    row = SharedPromptSequence(TWO)
    x = mx.random.normal((1, 3, len(row), 8))
    with use_token_positions():
        turned = rope(x, offset=row.rope_offset)
    for place, position in enumerate(row.positions.tolist()):
        alone = rope(x[:, :, place : place + 1], offset=position)
        assert mx.allclose(turned[:, :, place : place + 1], alone, atol=1e-6)


def test_tables_of_freed_frequencies_are_not_reused():
    row, ones = SharedPromptSequence(TWO), mx.ones((1, 1, len(SharedPromptSequence(TWO)), 8))
    for base in range(1, 40):  # of a list that is gone, the next array often gets the id
        with use_token_positions():
            result = mx.fast.rope(
                ones, 8, traditional=False, base=None, scale=1.0, offset=row.rope_offset,
                freqs=base * mx.arange(1.0, 5.0),
            )  # fmt: skip
        angles = row.positions[:, None] / (base * np.arange(1.0, 5.0))
        assert np.allclose(result[0, 0, :, :4], np.cos(angles) - np.sin(angles), atol=1e-4)


def test_positions_of_another_row_are_rejected():
    row = SharedPromptSequence(TWO)
    with use_token_positions(), pytest.raises(TypeError, match="arrays other than"):
        nn.RoPE(8)(mx.zeros((1, 3, 5, 8)), offset=row.rope_offset)


@pytest.mark.parametrize("arguments", [{"return_array": True}, {"length": 5}])
def test_a_model_that_needs_its_mask_as_an_array_is_rejected(arguments):
    with pytest.raises(TypeError, match="an array"):
        PackedCache(SharedPromptSequence(TWO)).make_mask(**{"length": 9} | arguments)


def test_positions_support_no_arithmetic():
    """A model that does would take the place in the row for the position in the text."""
    offset = PackedCache(SharedPromptSequence(TWO)).offset
    for compute in (lambda: offset + 1, lambda: 1 + offset, lambda: mx.arange(offset, 9)):
        with pytest.raises(TypeError):
            compute()


def test_outside_the_block_positions_and_masks_are_rejected():
    """So that no model runs on such a row with positions and sight of its own."""
    row = SharedPromptSequence(TWO)
    with pytest.raises((TypeError, ValueError)):
        nn.RoPE(8)(mx.zeros((1, 3, len(row), 8)), offset=row.rope_offset)
    q = mx.zeros((1, 2, len(row), 8))
    with pytest.raises(TypeError):
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=PackedMask(row, None))


def long_pairs():
    """Longer than a chunk, so that chunks begin inside of every part."""
    rng = np.random.default_rng(3)

    def draw(n):
        return tuple(rng.integers(1, VOCAB, n).tolist())

    lengths = [(CPU_QUERIES + 9, 40, CPU_QUERIES + 3), (5, 1, 70), (30, 2, 1)]
    return [TokenizedPair(*map(draw, row)) for row in lengths]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("saved_keys", [0, 10**6], ids=["recomputed", "saved"])
@pytest.mark.parametrize("is_cpu", [True, False], ids=["cpu", "gpu's arithmetic"])
def test_long_packed_pairs_equal_whole_rows(monkeypatch, recompute, saved_keys, is_cpu):
    monkeypatch.setattr("mlx_dpo.scoring.kernels.attention.MAX_SAVED_KEYS", saved_keys)
    for kernel in ("attention", "softmax"):
        monkeypatch.setattr(f"mlx_dpo.scoring.kernels.{kernel}.is_cpu", lambda: is_cpu)
    model = make_llama()
    adapters.attach_adapters(model, rank=4, scale=2.0)
    pairs = long_pairs()
    shared = make_shared_scorer(vocab_size=VOCAB, gradients=True, packing="row")

    def rows(scorer):
        return lambda model: mx.concatenate([*scorer(model, pairs)])[:, None]

    with ExitStack() as stack:
        stack.enter_context(memory_efficient_training(model, recompute=recompute))
        stack.enter_context(use_chunked_attention(CPU_QUERIES))
        result = relative_errors(model, rows(shared), rows(plain_scorer))
    assert result.values <= 1e-5
    assert result.gradients <= 1e-4


def test_padding_of_a_row_is_attended_to_by_no_token(monkeypatch):
    monkeypatch.setattr("mlx_dpo.scoring.packing.packed_sequence.padded_width", lambda length: 16)
    row = SharedPromptSequence(TWO)
    assert row.tokens.shape == (1, 16)
    whole = visible(row, 4)
    assert not whole[:9, 9:].any()
    assert not whole[9:, :9].any()
    assert row.head_rows().indices.max().item() < 9
    model = make_llama()
    shared = make_shared_scorer(vocab_size=VOCAB, gradients=False, packing="row")
    for ours, known in zip(shared(model, TWO), plain_scorer(model, TWO), strict=True):
        assert mx.allclose(ours, known, rtol=1e-5)
