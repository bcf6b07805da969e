"""Every architecture of mlx-lm that can be built here: the fast path is exact, or is not taken.

`scripts/tools/docs/architectures_page.py` writes the table of what was chosen
to docs/architectures.md.
"""

from contextlib import ExitStack

import mlx.core as mx
import pytest

from mlx_dpo.errors import ModelError
from mlx_dpo.scoring import lm_head as head
from mlx_dpo.scoring.equivalence import random_pairs, relative_errors, value_error
from mlx_dpo.scoring.kernels.attention_dispatch import use_chunked_attention
from mlx_dpo.scoring.kernels.gradient_checkpointing import gradient_checkpointing
from mlx_dpo.scoring.kernels.rope import use_token_positions
from mlx_dpo.scoring.scorers import plain_scorer
from mlx_dpo.scoring.select_scorer import PACKINGS, select_scorer
from tests.scoring.architectures import UNBUILT, VOCAB, WINDOW, adapt, build, model_types
from tests.scoring.branching import branching_sets

pytestmark = pytest.mark.slow

UNTRAINABLE = {
    "deepseek_v41": "Cannot calculate VJP with respect to indices",
    # Its window is one token wider without a cache, or in a prompt, than in generation.
    "plamo3": "differ from those of token-by-token generation",
}
SHARED = sorted(set(model_types()) - UNBUILT.keys() - UNTRAINABLE.keys())
WITH_CACHES = {"gemma3n"}  # without a cache, it does not share keys and values between layers

# A prompt of one token, completions of one, two prompts of one length, one past the window.
SHAPES = ((1, 3, 2), (6, 1, 1), (2 * WINDOW + 3, 5, 2), (6, 2, 7))


PAIRS = random_pairs(SHAPES, VOCAB)
BRANCHING = [pair for pairs in branching_sets(VOCAB).values() for pair in pairs]


def rows(scorer, pairs):
    return lambda model: mx.concatenate([*scorer(model, pairs)])[:, None]


def memory_savers(model, names):
    stack = ExitStack()
    stack.enter_context(use_token_positions())
    if "recomputed" in names:
        stack.enter_context(gradient_checkpointing(model))
    if "chunked" in names:
        stack.enter_context(use_chunked_attention(2))
    return stack


def test_enough_architectures_are_tested():
    assert len(SHARED) >= 70


@pytest.mark.parametrize("saved", [(), ("recomputed", "chunked")], ids=["", "saving-memory"])
@pytest.mark.parametrize("model_type", SHARED)
def test_the_shared_scorer_is_exact(model_type, saved, monkeypatch):
    monkeypatch.setattr("mlx_dpo.scoring.kernels.attention_dispatch.MIN_SCORES", 0)
    monkeypatch.setattr(head, "LOGITS_BYTES_PER_CHUNK", 5 * VOCAB * 4)
    model = adapt(build(model_type))
    for packing in PACKINGS:
        choice = select_scorer(model, vocab_size=VOCAB, packings=(packing, "lengths"))
        assert choice.name == ("trie" if choice.packing == "trie" else "shared"), choice.reason
        assert choice.generation.uses_caches == (model_type in WITH_CACHES)
        assert choice.generation.difference <= 1e-4
        pairs = BRANCHING if choice.packing == "trie" else PAIRS
        expected = rows(plain_scorer, pairs)
        with memory_savers(model, saved):
            result = relative_errors(model, rows(choice.scorer, pairs), expected)
        assert result.values <= 1e-5
        assert result.gradients <= 1e-4
        assert value_error(model, rows(choice.forward_only, pairs), expected) <= 1e-5


@pytest.mark.parametrize("model_type", UNTRAINABLE)
def test_untrainable_models_are_reported(model_type):
    with pytest.raises(ModelError, match=UNTRAINABLE[model_type]):
        select_scorer(adapt(build(model_type)), vocab_size=VOCAB)
