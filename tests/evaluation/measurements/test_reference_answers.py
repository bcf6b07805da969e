import json
import math
import random
from pathlib import Path
from statistics import fmean, stdev

import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.evaluation.measurements.paired_difference import paired_difference
from mlx_dpo.evaluation.measurements.rouge import (
    is_exact_match,
    longest_common_subsequence,
    rouge_l,
    split_words,
)
from mlx_dpo.generation.batch import generate_batch

WORDS = ["the", "cat", "sat", "on", "a", "mat,", "Hill", "house.", "it-is", "3.5", "don't"]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "the CAT sat", 1.0),
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin's example: 3 of 4
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("a b c", "a x b y", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("?!", "?!", 1.0),  # no words, but the same text
        ("?!", "...", 0.0),
        ("Das Café schließt", "das cafe\u0301 schließt", 1.0),  # two forms of é
        ("我喜欢猫", "我喜欢狗", 0.75),  # each character is a word
        ("猫 is 猫", "猫is猫", 1.0),
        ("Кошка на ковре", "кошка на крыше", 2 / 3),
    ],
)
def test_rouge_l_by_hand(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected)
    assert rouge_l(reference, answer) == pytest.approx(expected)  # F1 is symmetric


def test_rouge_l_of_english_is_that_of_rouge_score():
    library = pytest.importorskip("rouge_score.rouge_scorer", reason="comes with lm-eval")
    scorer = library.RougeScorer(["rougeL"], use_stemmer=False)
    draw = random.Random(0)
    for _ in range(300):
        answer, reference = (
            " ".join(draw.choices(WORDS, k=draw.randrange(1, 15))) for _ in range(2)
        )
        expected = scorer.score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(answer, reference) == pytest.approx(expected), (answer, reference)


def slow_lcs(first, second):
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + slow_lcs(first[1:], second[1:])
    return max(slow_lcs(first[1:], second), slow_lcs(first, second[1:]))


def test_the_longest_common_subsequence_equals_its_definition():
    draw = random.Random(1)
    for _ in range(200):
        first, second = (draw.choices("abc", k=draw.randrange(0, 7)) for _ in range(2))
        assert longest_common_subsequence(first, second) == slow_lcs(first, second)


def test_words_and_exact_matches():
    assert split_words("It's 3.5 km, snake_case!") == ["it", "s", "3", "5", "km", "snake", "case"]
    assert is_exact_match(" The  Cat\n", "the cat") is True
    assert is_exact_match("the cat.", "the cat") is False
    assert is_exact_match("STRASSE", "straße") is True


def test_marks_belong_to_words():
    assert split_words("हिन्दी की किताब।") == ["हिन्दी", "की", "किताब"]
    assert rouge_l("का", "की") == 0.0  # the vowels differ
    assert split_words("が\u3099猫") == ["が\u3099", "猫"]


def test_a_paired_difference_by_hand():
    base, aligned = [0.0, 1.0, 0.0, 0.5], [1.0, 1.0, 0.0, 1.0]
    found = paired_difference(base, aligned)
    assert found.mean == pytest.approx(0.375)
    half = 1.959963984540054 * stdev([1.0, 0.0, 0.0, 0.5]) / 2
    assert (found.low, found.high) == pytest.approx((0.375 - half, 0.375 + half))
    assert paired_difference([1.0], [0.5]).to_dict() == {"mean": -0.5, "interval_95": None}


def run(*words):
    return CliRunner().invoke(cli, ["eval", "run", *words])


def measured(*words):
    result = run("--reference-answers", *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["reference_answers"]


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def greedy(prompts, adapter=None, system=None):
    """Return the answers that mlx-lm's model gives, without our switch."""
    model, tokenizer = mlx_lm.load("base", adapter_path=adapter)
    turns = [] if system is None else [{"role": "system", "content": system}]
    conversations = [[*turns, {"role": "user", "content": text}] for text in prompts]
    sampling = Sampling(max_tokens=12)
    return generate_batch(model, tokenizer, conversations, sampling=sampling, context=None)


PROMPTS = [f"What is {n}?" for n in range(5)]


def test_each_model_matches_its_own_answers(workplace):
    answers = {"base": greedy(PROMPTS), "aligned": greedy(PROMPTS, "run")}
    assert answers["base"] != answers["aligned"]
    for state, other in (("base", "aligned"), ("aligned", "base")):
        rows = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers[state], strict=True)]
        figures = measured(write("qa.jsonl", rows), "--max-tokens", "12")
        assert figures["rows"] == 5
        assert figures[state]["exact_match"] == figures[state]["rouge_l"] == 1.0
        scores = list(map(rouge_l, answers[other], answers[state]))
        assert figures[other]["rouge_l"] == pytest.approx(fmean(scores))
        sign = 1 if state == "aligned" else -1
        difference = figures["difference"]["rouge_l"]
        assert difference["mean"] == pytest.approx(sign * (1 - fmean(scores)))
        low, high = difference["interval_95"]
        assert (high - low) / 2 == pytest.approx(1.959964 * stdev(scores) / math.sqrt(5), rel=1e-5)


def test_rows_of_every_shape_have_the_same_prompt_and_answer(workplace):
    [answer] = greedy(["What is 3?"])
    turns = [{"role": "user", "content": "What is 3?"}, {"role": "assistant", "content": answer}]
    rows = [
        {"prompt": "What is 3?", "answer": answer},
        {"prompt": "What is 3?", "completion": answer},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"messages": turns},
        {"prompt": "What is 3?", "chosen": answer, "rejected": "no"},
        {"instruction": "What is 3?", "output": answer},
    ]
    for number, row in enumerate(rows):
        figures = measured(write(f"{number}.jsonl", [row]), "--max-tokens", "12")
        assert figures["base"]["exact_match"] == 1.0, row
        assert figures["difference"]["rouge_l"]["interval_95"] is None


def test_only_the_last_answer_of_a_conversation_is_wanted(workplace):
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    turns = [*first, {"role": "user", "content": "What is 3?"}]
    model, tokenizer = mlx_lm.load("base")
    sampling = Sampling(max_tokens=12)
    [answer] = generate_batch(model, tokenizer, [turns], sampling=sampling, context=None)
    row = {"messages": [*turns, {"role": "assistant", "content": answer}]}
    figures = measured(write("chat.jsonl", [row]), "--max-tokens", "12")
    assert (figures["rows"], figures["base"]["exact_match"]) == (1, 1.0)


def test_dropped_rows_cut_answers_and_a_limit_are_reported(workplace):
    rows = [{"prompt": p, "answer": "It is."} for p in PROMPTS] + [{"prompt": "", "answer": "x"}]
    shown = run("--reference-answers", write("qa.jsonl", rows), "--limit", "2", "--max-tokens", "1")
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.split())
    assert "left out: 1 row without a usable prompt or answer" in text
    assert "the first 2 of 5 rows were used" in text
    assert "answers that were cut at 1 tokens" in text and "2 of the base" in text
    assert "Reference answers of qa.jsonl (2 rows)" in text and "ROUGE-L F1" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-tokens", "8"], "`--max-tokens` has no effect without --tasks or --reference-an"),
        (["--limit", "8"], "`--limit` has no effect without --tasks or --reference-answers"),
        (["--reference-answers", "none.jsonl"], "none.jsonl: no such file"),
        (["--reference-answers", "bare.jsonl"], "bare.jsonl:1: no `messages`"),
        (["--reference-answers", "empty.jsonl"], "empty.jsonl: contains no answers"),
        (["--reference-answers", "tools.jsonl"], "prompts with `tools` are not supported"),
    ],
)
def test_mistakes_are_one_line(workplace, words, message):
    write("bare.jsonl", [{"prompt": "What is 3?"}])
    write("empty.jsonl", [{"prompt": "What is 3?", "answer": " "}])
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    write("tools.jsonl", [{"prompt": "What?", "answer": "It is.", "tools": [tool]}])
    result = run(*words)
    assert result.exit_code == 1
    assert message in result.stderr.strip().splitlines()[-1]
