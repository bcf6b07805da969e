import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.collate import collate
from mlx_dpo.errors import TrainingError
from mlx_dpo.scoring.logps import completion_logps, pair_logps
from mlx_dpo.scoring.score_pairs import score_pairs
from tests.conftest import VOCAB


def by_hand(model, prompt, completion):
    """One token at a time, in float64, from a forward pass over exactly what lies before it."""
    ids, total = [*prompt], 0.0
    for token in completion:
        logits = np.array(model(mx.array([ids]))[0, -1], dtype=np.float64)
        shifted = logits - logits.max()
        total += shifted[token] - math.log(np.exp(shifted).sum())
        ids.append(token)
    return total


def test_exactly_the_completion_tokens_are_counted(uniform, pairs):
    logps = completion_logps(uniform, collate(pairs[:2], pad_multiple=8))
    counted = (-logps / math.log(VOCAB)).tolist()
    assert counted == pytest.approx([2, 4, 1, 2])  # chosen rows, then rejected rows


def test_chosen_rows_come_first(uniform, pairs):
    logps = pair_logps(uniform, collate(pairs[:2]))
    assert (-logps.chosen / math.log(VOCAB)).tolist() == pytest.approx([2, 4])
    assert (-logps.rejected / math.log(VOCAB)).tolist() == pytest.approx([1, 2])


def test_it_equals_a_token_loop_in_float64(tiny_llama, pairs):
    logps = pair_logps(tiny_llama, collate(pairs))
    for i, pair in enumerate(pairs):
        chosen = by_hand(tiny_llama, pair.prompt, pair.chosen)
        rejected = by_hand(tiny_llama, pair.prompt, pair.rejected)
        assert logps.chosen[i].item() == pytest.approx(chosen, abs=1e-4)
        assert logps.rejected[i].item() == pytest.approx(rejected, abs=1e-4)


def test_padding_changes_nothing(tiny_llama, pairs):
    narrow = completion_logps(tiny_llama, collate(pairs, pad_multiple=1))
    wide = completion_logps(tiny_llama, collate(pairs, pad_multiple=64))
    assert mx.allclose(narrow, wide, atol=1e-5, rtol=0)  # float32, sums of at most 4 terms


def test_the_batch_and_the_order_change_nothing(tiny_llama, pairs):
    together = score_pairs(tiny_llama, pairs, limit=PassLimit(pairs=5))
    alone = score_pairs(tiny_llama, pairs, limit=PassLimit(pairs=1))
    backwards = score_pairs(tiny_llama, pairs[::-1], limit=PassLimit(pairs=2))
    for a, b, c in zip(together, alone, backwards, strict=True):
        assert mx.allclose(a, b, atol=1e-5, rtol=0)
        assert mx.allclose(a, c[::-1], atol=1e-5, rtol=0)


def test_an_impossible_padding_token_does_not_poison_the_sum(pairs):
    """The model forbids token 0, which pads: minus infinity must stay under the mask."""

    def forbids_zero(tokens):
        logits = mx.zeros((*tokens.shape, VOCAB))
        logits[..., 0] = -mx.inf
        return logits

    logps = completion_logps(forbids_zero, collate(pairs[:2], pad_multiple=16))
    assert (-logps / math.log(VOCAB - 1)).tolist() == pytest.approx([2, 4, 1, 2])


def test_bfloat16_logits_are_reduced_in_float32(pairs):
    """A log-sum-exp in bfloat16 is off by up to 0.06 a token; the logits themselves are exact."""

    def model(tokens):
        ramp = mx.arange(VOCAB, dtype=mx.float32) / 8  # exact in bfloat16
        return mx.broadcast_to(ramp, (*tokens.shape, VOCAB)).astype(mx.bfloat16)

    logps = completion_logps(model, collate(pairs[:1]))
    normaliser = math.log(sum(math.exp(i / 8) for i in range(VOCAB)))
    assert logps.dtype == mx.float32
    assert logps.tolist() == pytest.approx(
        [(10 + 11) / 8 - 2 * normaliser, 20 / 8 - normaliser], abs=1e-4
    )


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_log_probability_that_is_not_finite_names_its_pair(pairs, value):
    """Counted as wrong or averaged away, it would pass for a result."""

    class Broken:
        def eval(self):
            pass

        def __call__(self, tokens):
            logits = mx.zeros((*tokens.shape, VOCAB))
            logits[..., 16] = value  # the completion of the third pair
            return logits

    with pytest.raises(TrainingError, match=r"^a:3: a completion has log-probability (nan|-inf)"):
        score_pairs(Broken(), pairs if value < 0 else pairs[2:3], limit=PassLimit(pairs=1))


def test_progress_counts_every_pair(uniform, pairs):
    counts = []
    model = type("Model", (type(uniform),), {"eval": lambda self: None})()
    score_pairs(model, pairs, limit=PassLimit(pairs=2), progress=counts.append)
    assert sum(counts) == 5
