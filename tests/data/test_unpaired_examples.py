"""Unpaired examples (KTO): how rows are parsed, and their mismatched completions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.data.dataset import with_mismatched_completions
from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.schemas import parse_unpaired
from mlx_dpo.schemas.schema import Row, RowRules
from mlx_dpo.types import TokenizedPair, UnpairedExample

UNPAIRED_RULES = RowRules(judged=True)
USER = {"role": "user", "content": "Hi?"}
BOT = {"role": "assistant", "content": "Yes."}


def read(**record):
    return parse_unpaired(Row(record, "rows:1"), UNPAIRED_RULES)


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_a_labelled_row_is_one_unpaired_example(label):
    assert read(prompt="Hi?", completion="Yes.", label=label) == [
        UnpairedExample("Hi?", "Yes.", bool(label), "rows:1")
    ]


def test_messages_end_with_the_completion():
    assert read(messages=[USER, BOT], label=False) == [
        UnpairedExample((USER,), (BOT,), False, "rows:1")
    ]
    assert read(prompt=[USER], completion=[BOT], label=True) == [
        UnpairedExample((USER,), (BOT,), True, "rows:1")
    ]
    assert read(prompt="Hi?", completion=[BOT], label=True)[0].prompt == (USER,)


def test_a_pair_is_two_unpaired_examples():
    assert read(prompt="Hi?", chosen="Yes.", rejected="No.") == [
        UnpairedExample("Hi?", "Yes.", True, "rows:1"),
        UnpairedExample("Hi?", "No.", False, "rows:1"),
    ]


def test_a_pair_in_renamed_columns_is_two_unpaired_examples():
    row = Row({"prompt": "Hi?", "good": "Yes.", "bad": "No."}, "rows:1")
    rules = RowRules(judged=True, renamed={"chosen": "good", "rejected": "bad"})
    report = PairsReport("rows", 0, judged=True)
    examples = [parsed.example for parsed in parse_rows([row], rules, report)]
    assert examples == read(prompt="Hi?", chosen="Yes.", rejected="No.")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": "yes"}, "`label` must be true or false"),
        ({"prompt": "a", "completion": "b", "label": 2}, "found 2"),
        ({"prompt": "a", "label": True}, "missing `completion`"),
        ({"messages": [USER], "label": True}, "must end with the assistant's answer"),
        ({"messages": [BOT], "label": True}, "must end with the assistant's answer"),
        ({"prompt": "a", "completion": " ", "label": True}, "empty"),
    ],
)
def test_an_invalid_labelled_row_is_an_error(record, message):
    with pytest.raises(DataError, match=message):
        read(**record)


def rows(*prompts):
    return [
        TokenizedPair((i,), (100 + i, 200 + i, 9), (), prompt_digest=prompt, desirable=True)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("abc", [2, 0, 1]),  # each the one before; the first goes on at the end
        ("aabb", [2, 3, 0, 1]),
        ("abba", [1, 0, 3, 2]),
        ("aab", [2, 2, 0]),  # more than half have one prompt: the others are taken again
        ("abaa", [1, 0, 1, 1]),
    ],
)
def test_each_example_gets_the_completion_of_another_prompt(prompts, expected):
    made = with_mismatched_completions(rows(*prompts), max_length=64)
    assert [row.rejected[0] - 100 for row in made] == expected
    assert [row.chosen for row in made] == [row.chosen for row in rows(*prompts)]


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40).filter(lambda a: len(set(a)) > 1))
def test_every_completion_is_used_once_and_never_for_its_own_prompt(prompts):
    """For examples made from pairs, undesirable completions alone would bias the KL estimate."""
    made = with_mismatched_completions(rows(*map(str, prompts)), max_length=64)
    against = [row.rejected[0] - 100 for row in made]
    assert all(prompts[i] != prompts[other] for i, other in enumerate(against))
    if 2 * max(map(prompts.count, prompts)) <= len(prompts):
        assert sorted(against) == list(range(len(prompts)))


def test_a_mismatched_completion_is_truncated_and_never_empty():
    made = with_mismatched_completions(rows("a", "b"), max_length=3)
    assert [len(row.rejected) for row in made] == [2, 2]
    assert [
        len(row.rejected) for row in with_mismatched_completions(rows("a", "b"), max_length=1)
    ] == [1, 1]


def test_examples_of_a_single_prompt_raise_an_error():
    with pytest.raises(ConfigError, match="at least two prompts"):
        with_mismatched_completions(rows("a", "a"), max_length=64)
    assert with_mismatched_completions([], max_length=64) == []


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_may_mix_labelled_rows_and_pairs_and_counts_examples(tmp_path, plain):
    path = written(
        tmp_path / "rows.jsonl",
        {"prompt": "Hi?", "completion": "Yes.", "label": False},
        {"prompt": "Ho?", "chosen": "Yes.", "rejected": "No."},
    )
    found = load_pairs(path, plain, TokenRules(vocab_size=262), rows=UNPAIRED_RULES)
    assert [pair.desirable for pair in found.pairs] == [False, True, False]
    assert [pair.rejected for pair in found.pairs] == [()] * 3
    first, *_ = found.report.lines()
    assert "3 labelled answers" in first and "1 good and 2 bad" in first
    assert not found.report.unused_fields


def test_a_completion_has_the_same_tokens_as_in_a_pair(tmp_path, chat):
    pair = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    path = written(tmp_path / "rows.jsonl", pair)
    rules = TokenRules(vocab_size=262)
    (whole,) = load_pairs(path, chat(), rules).pairs
    good, bad = load_pairs(path, chat(), rules, rows=UNPAIRED_RULES).pairs
    assert (good.prompt, good.chosen, bad.chosen) == (whole.prompt, whole.chosen, whole.rejected)


def test_without_kto_a_labelled_row_raises_an_error_with_advice(tmp_path, plain):
    path = written(tmp_path / "rows.jsonl", {"prompt": "Hi?", "completion": "Y", "label": True})
    with pytest.raises(DataError, match="--loss-type kto"):
        load_pairs(path, plain, TokenRules(vocab_size=262))


def test_margins_and_weights_are_read_from_the_given_columns(tmp_path, plain):
    pair = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "lead": 2, "trust": 0.5}
    path, rules = written(tmp_path / "rows.jsonl", pair), TokenRules(vocab_size=262)
    silent = load_pairs(path, plain, rules)
    weighted = load_pairs(path, plain, rules, rows=RowRules(margin="lead", weight="trust"))
    assert (silent.pairs[0].margin, silent.pairs[0].weight) == (0.0, 1.0)
    assert (weighted.pairs[0].margin, weighted.pairs[0].weight) == (2.0, 0.5)
    assert set(silent.report.unused_fields) == {"lead", "trust"}
    assert not weighted.report.unused_fields
    # What a run depends on is its digest.
    assert pairs_digest(silent.pairs) != pairs_digest(weighted.pairs)


@pytest.mark.parametrize("value", ["much", None, True, float("nan"), -1])
def test_a_weight_must_be_a_number_of_at_least_0(tmp_path, plain, value):
    pair = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "trust": value}
    path = written(tmp_path / "rows.jsonl", pair)
    with pytest.raises(DataError, match="`trust` must be a number of at least 0"):
        load_pairs(path, plain, TokenRules(vocab_size=262), rows=RowRules(weight="trust"))
