"""The real files: each recognised without options, and tokenized through a chat template."""

import pytest

from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.sources import read_rows
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.errors import DIFFERENT_PROMPTS, EMPTY_COMPLETION, BadPairError, DataError
from mlx_dpo.schemas import find_schema, parse_pairs
from mlx_dpo.schemas.schema import RowRules
from tests.data.template_families import byte_level

RULES = TokenRules(vocab_size=1000, max_length=100_000)
FILES = {
    "lf-dpo-en/dpo_en_demo.json": ("sharegpt", 299),
    "foundry-orca-dpo/validation.jsonl": ("openai", 284),
}
DIALOGUES = "hh-harmless-test/test.jsonl"
SOME = 600  # of the dialogues


@pytest.fixture
def dialogues(material, tmp_path):
    lines = (material / "data" / DIALOGUES).read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:SOME]))
    return tmp_path / "some.jsonl"


@pytest.mark.parametrize("name", FILES)
def test_the_schema_of_a_real_file_is_detected(material, name):
    schema, count = FILES[name]
    tokenizer = byte_level("chatml")
    found = load_pairs(material / "data" / name, tokenizer, RULES)
    assert found.report.schemas.keys() == {schema}
    assert len(found.pairs) == count == found.report.as_chat
    assert not found.report.stops_added
    assert not found.report.unused_fields
    for pair in found.pairs:
        for completion in (pair.chosen, pair.rejected):
            assert completion.count(tokenizer.eos_token_id) == 1
            assert completion[-1] == tokenizer.eos_token_id


def test_the_turns_of_real_dialogues_are_those_of_the_text(dialogues):
    """Only the turn marks and the white space next to them are removed."""
    tokenizer = byte_level("chatml")
    found = load_pairs(dialogues, tokenizer, RULES, bad_pairs="drop")
    assert found.report.schemas == {"dialogues": SOME}
    assert found.report.dialogues == len(found.pairs) == SOME - 2
    assert {reason: len(places) for reason, places in found.report.dropped.items()} == {
        EMPTY_COMPLETION: 2
    }
    text = load_pairs(
        dialogues, tokenizer, TokenRules(vocab_size=1000, max_length=100_000, chat_template="text"),
        bad_pairs="drop",
    )  # fmt: skip
    marks = {"<|im_start|>user\n": "Human:", "<|im_start|>assistant\n": "Assistant:"}
    for as_chat, as_text in zip(found.pairs[::7], text.pairs[::7], strict=True):
        turns, words = (tokenizer.decode(p.prompt + p.chosen[:-1]) for p in (as_chat, as_text))
        for written, mark in marks.items():
            turns = turns.replace(written, f"\n\n{mark} ")
        assert "".join(turns.replace("<|im_end|>", "").split()) == "".join(words.split())


def test_a_labelled_file_raises_an_error_with_advice_unless_labels_are_used(material):
    path = material / "data" / "lf-kto-en" / "kto_en_demo.json"
    tokenizer = byte_level("chatml")
    with pytest.raises(DataError, match=r"\[0\]: unpaired data .* use --loss-type kto"):
        load_pairs(path, tokenizer, RULES)
    report = load_pairs(path, tokenizer, RULES, rows=RowRules(judged=True)).report
    assert (report.used, report.desirable) == (300, 150)
    paired = load_pairs(path, tokenizer, RULES, rows=RowRules(pair_labelled=True))
    [pair] = paired.pairs  # two more prompts occur twice, but with the same label
    assert "[" in pair.location and " and " in pair.location
    assert sum(map(len, paired.report.dropped.values())) == 298


def test_the_bad_pairs_of_real_dialogues_are_found(material):
    """Four completions are empty and five dialogues have different prompts (see its ABOUT.md)."""
    faults = {}
    for row in read_rows(material / "data" / "hh-harmless-test" / "test.jsonl"):
        try:
            [preference] = parse_pairs(row)
        except BadPairError as bad:
            faults.setdefault(bad.reason, []).append(int(row.location.rpartition(":")[2]))
            continue
        assert find_schema(row).name == "dialogues"
        assert preference.prompt.endswith("\n\nAssistant:")
        assert preference.prompt + preference.chosen == row.record["chosen"]
        assert preference.prompt + preference.rejected == row.record["rejected"]
    assert faults == {
        EMPTY_COMPLETION: [87, 517, 926, 1104],
        DIFFERENT_PROMPTS: [1255, 1689, 1951, 1953, 2037],
    }
