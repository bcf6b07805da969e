"""Ranked rows: what of a list survives parsing, tokenizing and dropping, and what is reported."""

import pytest

from mlx_dpo.data.batches.metadata import list_indices, pair_metadata
from mlx_dpo.data.columns import RANKINGS, column
from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.schemas.schema import RowRules
from mlx_dpo.types import NO_LIST

RULES, ALL = TokenRules(vocab_size=262), RowRules(ranked="all")
ROW = {"prompt": "hi", "completions": ["a", "bb", "ccc"], "scores": [0.5, 2, 1]}
TIES = {"prompt": "ho", "completions": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 3]}


def places(pairs):
    return [(pair.ranking.chosen, pair.ranking.rejected) for pair in pairs]


def test_each_pair_knows_its_list_its_completions_and_their_scores(write, plain):
    pairs = load_pairs(write(ROW, ROW | {"prompt": "ha"}), plain, RULES, rows=ALL).pairs
    assert places(pairs) == [(1, 2), (1, 0), (2, 0)] * 2
    first = pairs[0].ranking
    assert first[3:] == (2.0, 1.0, 1.5, 3)
    assert {pair.ranking.list_id for pair in pairs[:3]} == {first.list_id}
    assert pairs[3].ranking.list_id != first.list_id
    assert [len(pair.chosen) for pair in pairs[:3]] == [3, 3, 4]  # with the stop token


def test_ranks_are_negative_scores_and_ties_make_no_pair(write, plain):
    pairs = load_pairs(write(TIES), plain, RULES, rows=ALL).pairs
    assert places(pairs) == [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)]
    assert pairs[2].ranking[3:] == (-1.0, -3.0, 2.0, 5)


@pytest.mark.parametrize(("how", "count"), [("best_worst", 1), ("adjacent", 2), ("all", 3)])
def test_the_number_of_pairs_is_that_of_the_pairing(write, plain, how, count):
    pairs = load_pairs(write(ROW), plain, RULES, rows=RowRules(ranked=how)).pairs
    assert [pair.ranking.num_pairs for pair in pairs] == [count] * count
    assert pair_metadata(pairs).best_worst.tolist().count(True) == (how == "all")


def test_plain_pairs_belong_to_no_list(write, plain):
    row = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    [pair] = load_pairs(write(row), plain, RULES, rows=ALL).pairs
    assert pair.ranking == NO_LIST


def test_lists_are_numbered_by_their_rows(write, plain):
    """Rows of one prompt are different lists, and a row that occurs twice is two lists."""
    other = ROW | {"completions": ["x", "yy", "zzz"]}
    pairs = load_pairs(write(ROW, other, ROW), plain, RULES, rows=ALL).pairs
    mixed = [pairs[i] for i in (0, 3, 6, 4, 1, 7, 8, 5, 2)]
    found = list_indices(column(mixed, RANKINGS)).tolist()
    assert found == [0, 1, 2, 1, 0, 2, 0, 1, 2]  # the equal rows' pairs may change over


def test_the_report_says_what_all_pairs_cost(write, plain):
    rows = [ROW | {"prompt": f"a long prompt {i}"} for i in range(2)]
    report = load_pairs(write(*rows), plain, RULES, rows=ALL).report
    counts = report.lists
    assert (counts.lists, counts.completions, counts.pairs, counts.made) == (2, 6, 6, 6)
    prompt, a, b, c = 16, 2, 3, 4  # with BOS and stop tokens
    assert counts.tokens == 2 * (prompt + a + b + c)
    assert counts.pair_tokens == 2 * (3 * prompt + 2 * (a + b + c))
    assert counts.best_worst_tokens == 2 * (prompt + a + b)
    line = (
        "2 ranked lists, 6 completions, 6 pairs: 1.2 times the tokens of --ranked best_worst if "
        "pairs share completions, 3.1 times if not"
    )
    assert line in report.lines()
    assert line in report.warning_lines()[0]
    assert PairsReport.from_dict(report.to_dict()) == report
    for how in ("adjacent", "all"):
        counts = load_pairs(write(*rows), plain, RULES, rows=RowRules(ranked=how)).report.lists
        assert counts.best_worst_tokens == 2 * (prompt + a + b)
    one_pair = load_pairs(write(*rows), plain, RULES).report
    assert not any("ranked lists" in text for text in one_pair.lines())


def test_a_list_that_lost_pairs_is_reported(write, plain):
    row = ROW | {"completions": ["a", "bb", "a"]}
    report = load_pairs(write(row, ROW), plain, RULES, rows=ALL, bad_pairs="drop").report
    assert "1 of 6 pairs of these lists are left out" in report.lines()
    long = ROW | {"completions": ["a", "b", "c" * 40]}
    rules = TokenRules(vocab_size=262, max_length=20, truncation="drop")
    report = load_pairs(write(long), plain, rules, rows=ALL).report
    assert "2 of 3 pairs of these lists are left out" in report.lines()


def test_a_list_whose_prompts_are_cut_differently_is_reported(write, plain):
    """A completion then stands behind another prompt in each pair."""
    row = {"prompt": "p" * 20, "completions": ["a", "b" * 12, "c" * 3], "scores": [3, 2, 1]}
    line = (
        "1 ranked list with prompts that were cut differently from pair to pair; "
        "--truncation keep_start leaves them whole"
    )
    for truncation in ("keep_end", "keep_start"):
        rules = TokenRules(vocab_size=262, max_length=24, truncation=truncation)
        report = load_pairs(write(row), plain, rules, rows=ALL).report
        assert report.truncated
        assert (line in report.lines()) == (truncation == "keep_end")
