import math

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo.evaluation.compare import (
    Column,
    ScoredAnswer,
    TextSpan,
    completion_token_logps,
    repetition_rate,
    score_spans,
)
from mlx_dpo.generation.generate import GeneratedTokens
from tests.checkpoints import END, make_checkpoint
from tests.conftest import VOCAB


def answer(*tokens, end=0.0):
    return ScoredAnswer(tuple(TextSpan(str(token), 0.0) for token in tokens), end, tokens)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return mlx_lm.load(str(make_checkpoint(tmp_path_factory.mktemp("tokens"))))[1]


class Reads:
    """The next token is likely to be the last one's successor: 9 against 0 for the others."""

    def __call__(self, tokens):
        return mx.where(mx.arange(VOCAB) == tokens[..., None] + 1, 9.0, 0.0)


def test_each_token_is_scored_by_what_stands_before_it():
    """5 follows 4 and 6 follows 5; 9 follows nothing, and the prompt is not scored."""
    other = -math.log(math.exp(9) + VOCAB - 1)
    found = completion_token_logps(Reads(), [9, 4], [5, 6, 9])
    assert found == pytest.approx([9 + other, 9 + other, other], abs=1e-5)
    assert completion_token_logps(Reads(), [9, 4], []) == []


def test_bits_are_tokens_and_whole_characters_with_the_sum_of_theirs(tokenizer):
    text = "cat 🐶!"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    ratios = [float(n) for n in range(1, len(tokens) + 2)]
    found = score_spans(tokenizer, GeneratedTokens(tokens, END), ratios, [0.5] * len(ratios))
    assert found.text == text
    assert [bit.text for bit in found.bits if not bit.text.isascii()] == ["🐶"]
    at = [bit.text for bit in found.bits].index("🐶")
    assert found.bits[at].log_ratio == pytest.approx(sum(ratios[at : at + 4]) - 4 * 0.5)
    assert found.end == ratios[-1] - 0.5
    assert found.log_ratio == pytest.approx(sum(ratios) - 0.5 * len(ratios))


def test_an_answer_that_was_cut_has_no_end_and_loses_no_token(tokenizer):
    """Cut within a character: what is left of it is shown, and its ratio counted."""
    tokens = tokenizer.encode("a🐶", add_special_tokens=False)[:-1]
    found = score_spans(
        tokenizer, GeneratedTokens(tokens, None), [1.0] * len(tokens), [0.0] * len(tokens)
    )
    assert found.end is None
    assert found.log_ratio == len(tokens)
    assert found.tokens == tuple(tokens)


def test_policy_and_reference_must_have_scored_the_same_tokens(tokenizer):
    with pytest.raises(ValueError):
        score_spans(tokenizer, GeneratedTokens([5, 6], END), [0.0] * 3, [0.0] * 2)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ((1, 2, 3), 0.0),  # no run of four
        ((1, 2, 3, 4, 5), 0.0),
        ((1, 2, 3, 4, 1, 2, 3, 4), 1 / 5),  # 1234 again, among 5 runs
        ((7,) * 13, 9 / 10),
    ],
)
def test_repetition_is_the_share_of_runs_of_four_that_were_there_before(tokens, share):
    assert repetition_rate(answer(*tokens)) == pytest.approx(share)


def test_figures_are_counts_and_means_over_answers():
    said = (
        ScoredAnswer((TextSpan("I cannot", 1.5),), None, (1, 2, 3)),
        ScoredAnswer((TextSpan("Yes", -0.5), TextSpan("!", 0.25)), 0.25, (7,) * 5),
    )
    assert Column("base", said).figures() == {
        "tokens an answer": "4.0",
        "cut before their end": "1",
        "4 tokens said before": "25.0%",  # none in the first, 1 of 2 in the other
        "refusals": "1",
        "log-ratio, nats an answer": "+0.75",
    }
