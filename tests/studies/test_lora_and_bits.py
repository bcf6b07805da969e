"""Log-probs and divergences of answers, and what the claims compute, against values by hand."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.models.load import load_tokenizer
from mlx_dpo.paths import tiny_chat
from scripts.studies import lora_and_bits as study
from scripts.studies.parts.lora_and_bits.cells import FULL_RATES, FUSED, LORA_RATES, MAIN, QLORA
from scripts.studies.parts.lora_and_bits.pictures import best_cell, full_cell, value
from scripts.studies.parts.lora_and_bits.shipped_model import (
    Text,
    mean_kl,
    preferences,
    text_logps,
    tokenize,
)


def always(*probabilities):
    """Return a model that gives the same probabilities after any tokens."""
    logps = mx.log(mx.array(probabilities)) + 3.0  # log-probs up to a constant

    def model(tokens):
        return mx.broadcast_to(logps, (*tokens.shape, len(probabilities)))

    return model


def test_the_logps_of_an_answer_are_summed_over_its_tokens_alone():
    texts = [Text([0, 0], [1]), Text([0], [2, 1, 1]), Text([1, 1, 1], [0, 2])]
    found = text_logps(always(0.5, 0.25, 0.25), texts)
    assert found == pytest.approx([-2 * math.log(2), -6 * math.log(2), -3 * math.log(2)])


def test_the_divergence_is_summed_over_the_places_of_an_answer():
    texts = [Text([0], [1]), Text([0, 0], [1, 0, 1])]
    per_token = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    expected = 2 * per_token  # one and three places
    assert mean_kl(always(0.5, 0.5), always(0.25, 0.75), texts) == pytest.approx(expected, rel=1e-5)


def test_an_answer_has_the_tokens_between_the_assistant_and_the_end():
    tokenizer = load_tokenizer(tiny_chat(), "tiny-chat", trust_remote_code=False)
    row = preferences("valid")[0]
    (text,) = tokenize(tokenizer, [row], "chosen")
    tokens = tokenizer.convert_ids_to_tokens(text.prompt + text.answer)
    assert tokens[0] == "<|user|>" and tokens[len(text.prompt) - 1] == "<|assistant|>"
    assert tokens[-1] == "<|end|>" and tokens.count("<|end|>") == 2
    assert tokenizer.decode(text.answer[:-1]) == row["chosen"][0]["content"]


def row_of(cell, **values):
    return {"seed": 0, **cell._asdict(), "fused_bits": 0} | values


def rates(lora, full):
    """Return rows of both methods whose rewards are `lora` and `full`, by learning rate."""
    rows = [
        row_of(MAIN._replace(multiple=multiple), reward=reward, learning_rate=10 * multiple)
        for multiple, reward in zip(LORA_RATES, lora, strict=True)
    ]
    return rows + [
        row_of(full_cell(multiple), reward=reward, learning_rate=multiple)
        for multiple, reward in zip(FULL_RATES, full, strict=True)
    ]


def test_both_methods_are_compared_at_their_best_learning_rates():
    rows = rates((0.5, 0.6, 0.8), (0.7, 0.65, 0.2))
    assert best_cell(rows, "lora").multiple == 4 and best_cell(rows, "full").multiple == 4
    assert study.best_rate_ratio(rows) == 40 / 4
    assert study.lora_minus_full(rows) == pytest.approx(0.8 - 0.7)


def test_a_quick_run_compares_the_middle_learning_rates():
    rows = [row_of(MAIN, reward=0.7), row_of(full_cell(), reward=0.75)]
    assert study.lora_minus_full(rows) == pytest.approx(-0.05)


def test_the_divergence_of_full_fine_tuning_is_interpolated_at_the_margin_of_lora():
    points = zip(FULL_RATES, (1.0, 4.0, 9.0), (0.1, 0.4, 0.9), strict=True)
    rows = [row_of(full_cell(multiple), margin=m, kl=kl) for multiple, m, kl in points]
    # In logarithms, a margin of 2 is half of the way from 1 to 4, and 0.2 from 0.1 to 0.4.
    assert study.kl_at_equal_margin([*rows, row_of(MAIN, margin=2.0, kl=0.1)]) == pytest.approx(0.5)


def test_what_fusing_leaves_is_a_share_of_the_margin_before():
    rows = [
        row_of(QLORA, margin=4.0),
        row_of(QLORA, margin=3.0, method=FUSED) | {"fused_bits": 8},
        row_of(QLORA, margin=1.0, method=FUSED) | {"fused_bits": 4},
    ]
    assert study.fused_share(rows, QLORA, 8) == 0.75
    assert study.fused_share(rows, QLORA, 4) == 0.25
    assert np.isclose(value(rows, QLORA, "margin"), 4.0)
