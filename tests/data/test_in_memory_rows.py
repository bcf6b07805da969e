"""Pairs from memory: lists of dictionaries and `datasets.Dataset` are read as files are."""

import sys

import datasets
import pytest

from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.data.hf_datasets import InMemoryRows
from mlx_dpo.data.inspect.raw_rows import read_raw_rows
from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.sources import find_sources, resolve_source, to_inputs
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.schemas.schema import RowRules
from tests.data.byte_tokenizer import CHAT, ByteTokenizer

RULES = TokenRules(vocab_size=262)
ROWS = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(5)]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "yo"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
]


@pytest.mark.parametrize("rows", [ROWS, MESSAGES], ids=["strings", "messages"])
def test_rows_in_memory_become_the_pairs_of_a_file(write, rows):
    tokenizer = ByteTokenizer(CHAT)
    from_file = load_pairs(write(*rows), tokenizer, RULES)
    dataset = datasets.Dataset.from_list(rows)
    for source in (rows, tuple(rows), iter(rows), dataset, InMemoryRows(rows)):
        loaded = load_pairs(source, tokenizer, RULES)
        assert pairs_digest(loaded.pairs) == pairs_digest(from_file.pairs)
        assert [pair.location for pair in loaded.pairs] == [f"pairs[{i}]" for i in range(len(rows))]
        assert loaded.report.schemas == from_file.report.schemas
        assert loaded.report.source == "pairs"


def test_without_rules_the_rules_of_training_apply():
    pairs = load_pairs(ROWS, ByteTokenizer(CHAT)).pairs
    assert list(pairs) == list(load_pairs(ROWS, ByteTokenizer(CHAT), RULES).pairs)


def test_columns_and_labels_are_read_from_memory_too():
    rows = [{"q": "a", "completion": "b", "label": i % 2 == 0} for i in range(4)]
    rules = RowRules(judged=True, renamed={"prompt": "q"})
    pairs = load_pairs(rows, ByteTokenizer(CHAT), RULES, rows=rules).pairs
    assert [pair.desirable for pair in pairs] == [True, False, True, False]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {"prompt": "a"}], r"^pairs\[5\]: missing `chosen`"),
        ([*ROWS, "text"], r"^pairs\[5\]: expected an object, found text"),
        ([ROWS[0] | {"chosen": "no"}], r"^pairs\[0\]: chosen and rejected are the same text"),
        ([], r"^pairs: contains no pairs"),
        (ROWS[0], r"^pairs: expected a list of dictionaries or one split of a dataset, found keys"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "found keys `train`"),
        (7, "^pairs: expected a list of dictionaries or a dataset, found int"),
    ],
)
def test_an_error_names_the_place_in_memory(rows, message):
    with pytest.raises(DataError, match=message):
        load_pairs(rows, ByteTokenizer(CHAT), RULES)


def test_the_digest_is_that_of_the_content():
    digest = InMemoryRows(ROWS).digest
    assert digest == InMemoryRows(datasets.Dataset.from_list(ROWS)).digest
    assert digest == InMemoryRows([dict(reversed(row.items())) for row in ROWS], "other").digest
    assert digest == InMemoryRows([row | {"note": None} for row in ROWS]).digest
    others = [ROWS[:-1], ROWS[::-1], [*ROWS, ROWS[0]], [row | {"note": ""} for row in ROWS]]
    assert len({digest, *(InMemoryRows(rows).digest for rows in others)}) == 5


def test_null_fields_of_a_dataset_do_not_change_the_digest():
    rows = [ROWS[0] | {"score": {"a": 1}}, ROWS[1] | {"score": {"b": 2}}, ROWS[2]]
    assert InMemoryRows(rows).digest == InMemoryRows(datasets.Dataset.from_list(rows)).digest


def test_a_row_that_is_no_json_has_no_digest():
    nested = []
    nested.append(nested)
    with pytest.raises(DataError, match=r"^pairs\[1\]: cannot be written as JSON"):
        _ = InMemoryRows([ROWS[0], {"prompt": nested}]).digest


def test_inputs_are_names_and_rows(write):
    assert to_inputs("a") == ["a"]
    assert to_inputs(["a", "b"]) == ["a", "b"]
    [rows] = to_inputs(ROWS)
    assert (rows.name, len(rows)) == ("pairs", 5)
    [dataset] = to_inputs(datasets.Dataset.from_list(ROWS))
    assert [row.location for row in dataset.rows()][-1] == "pairs[4]"
    name, first, second = to_inputs(["a", ROWS, ROWS[:2]])
    assert (name, first.name, second.name) == ("a", "pairs", "pairs-2")


def test_sources_of_training_and_held_out_pairs_can_be_in_memory(write):
    path = str(write(*ROWS))
    sources = find_sources([InMemoryRows(ROWS), path], ROWS[:2])
    assert [source.name for source in sources.train] == ["pairs", "pairs.jsonl"]
    assert [len(list(source.rows())) for source in (*sources.train, *sources.valid)] == [5, 5, 2]
    with pytest.raises(ConfigError, match="`split` has no effect"):
        find_sources(ROWS, split="train")


def test_rows_in_memory_can_be_checked_and_written(write):
    rows = list(read_raw_rows(resolve_source(ROWS)))
    assert [row.location for row in rows] == [f"pairs[{i}]" for i in range(5)]
    assert rows[0].to_json_line() == b'{"prompt": "q0", "chosen": "yes 0", "rejected": "no"}'


def test_a_list_is_read_without_the_library_of_datasets(monkeypatch):
    monkeypatch.delitem(sys.modules, "datasets")
    assert len(load_pairs(ROWS, ByteTokenizer(CHAT), RULES).pairs) == 5
    assert "datasets" not in sys.modules
