import math

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo.evaluation.compare import (
    PolicyAnswers,
    ScoredAnswer,
    TextSpan,
    completion_token_logps,
    score_spans,
)
from mlx_dpo.generation.batch import GeneratedTokens
from mlx_dpo.generation.repetition import repetition_rate
from tests.checkpoints import END, make_checkpoint
from tests.conftest import VOCAB


def make_answer(*tokens, end=0.0):
    return ScoredAnswer(tuple(TextSpan(str(token), 0.0) for token in tokens), end, tokens)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return mlx_lm.load(str(make_checkpoint(tmp_path_factory.mktemp("tokens"))))[1]


class SuccessorModel:
    """A fake model with logit 9 for the successor of the last token and 0 for all others."""

    def __call__(self, tokens):
        return mx.where(mx.arange(VOCAB) == tokens[..., None] + 1, 9.0, 0.0)


def test_each_token_is_scored_given_the_tokens_before_it():
    """5 follows 4 and 6 follows 5; 9 is no successor, and the prompt is not scored."""
    other = -math.log(math.exp(9) + VOCAB - 1)
    logps = completion_token_logps(SuccessorModel(), [9, 4], [5, 6, 9])
    assert logps == pytest.approx([9 + other, 9 + other, other], abs=1e-5)
    assert completion_token_logps(SuccessorModel(), [9, 4], []) == []


def test_spans_are_tokens_or_whole_characters_with_summed_log_ratios(tokenizer):
    text = "cat 🐶!"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    ratios = [float(n) for n in range(1, len(tokens) + 2)]
    answer = score_spans(tokenizer, GeneratedTokens(tokens, END), ratios, [0.5] * len(ratios))
    assert answer.text == text
    assert [span.text for span in answer.spans if not span.text.isascii()] == ["🐶"]
    index = [span.text for span in answer.spans].index("🐶")
    assert answer.spans[index].log_ratio == pytest.approx(sum(ratios[index : index + 4]) - 4 * 0.5)
    assert answer.end == ratios[-1] - 0.5
    assert answer.log_ratio == pytest.approx(sum(ratios) - 0.5 * len(ratios))


def test_a_cut_answer_has_no_end_and_loses_no_token(tokenizer):
    """Cut within a character: the incomplete character is shown, and its log-ratio counted."""
    tokens = tokenizer.encode("a🐶", add_special_tokens=False)[:-1]
    answer = score_spans(
        tokenizer, GeneratedTokens(tokens, None), [1.0] * len(tokens), [0.0] * len(tokens)
    )
    assert answer.end is None
    assert answer.log_ratio == len(tokens)
    assert answer.tokens == tuple(tokens)


def test_policy_and_reference_must_score_the_same_tokens(tokenizer):
    with pytest.raises(ValueError):
        score_spans(tokenizer, GeneratedTokens([5, 6], END), [0.0] * 3, [0.0] * 2)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ((1, 2, 3), 0.0),  # no 4-gram
        ((1, 2, 3, 4, 5), 0.0),
        ((1, 2, 3, 4, 1, 2, 3, 4), 1 / 5),  # 1234 again, among 5 4-grams
        ((7,) * 13, 9 / 10),
    ],
)
def test_repetition_is_the_share_of_repeated_4_grams(tokens, share):
    assert repetition_rate(tokens) == pytest.approx(share)


def test_the_summary_has_counts_and_means_over_answers():
    answers = (
        ScoredAnswer((TextSpan("I cannot", 1.5),), None, (1, 2, 3)),
        ScoredAnswer((TextSpan("Yes", -0.5), TextSpan("!", 0.25)), 0.25, (7,) * 5),
    )
    assert PolicyAnswers("base", answers).summary() == {
        "tokens per answer": "4.0",
        "cut at the token limit": "1",
        "4-gram repetition": "25.0%",  # none in the first, 1 of 2 in the other
        "refusals": "1",
        "log-ratio, nats per answer": "+0.75",
    }
