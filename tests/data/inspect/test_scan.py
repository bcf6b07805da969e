"""The known faults of the real files are found, with their places."""

from mlx_dpo.data.inspect.results import list_findings, run_checks
from mlx_dpo.data.inspect.scan import ScanSettings
from mlx_dpo.data.sources import find_sources
from mlx_dpo.schemas.schema import RowRules


def places(path, **rules):
    split = run_checks(find_sources(str(path)), ScanSettings(rows=RowRules(**rules))).train
    return split, {
        finding.check.name: [
            tuple(where.removeprefix(str(path)) for where in pair if where is not None)
            for pair in finding.locations()
        ]
        for finding in list_findings(split)
    }


def test_dialogues_that_differ_early_and_empty_answers_of_hh(material):
    split, found = places(material / "data" / "hh-harmless-test" / "test.jsonl")
    assert (split.rows, split.pairs) == (2312, 2303)
    assert found["different-prompts"] == [(f":{n}",) for n in (1255, 1689, 1951, 1953, 2037)]
    assert found["empty-completion"] == [(f":{n}",) for n in (87, 517, 926, 1104)]
    assert found.keys() == {"different-prompts", "empty-completion", "refusal", "duplicate-prompt"}


def test_prompts_that_come_twice_with_and_without_both_labels(material):
    path = material / "data" / "lf-kto-en" / "kto_en_demo.json"
    _, found = places(path, judged=True)
    twice = [("[102]", "[36]"), ("[195]", "[64]"), ("[293]", "[181]")]
    assert found["duplicate-prompt"] == twice
    assert found["both-labels"] == [("[64]", "[195]"), ("[195]", "[64]")]
    _, unasked = places(path)
    assert len(unasked["unreadable"]) == 300


def test_faults_of_the_other_files_that_nobody_had_listed(material):
    _, found = places(material / "data" / "lf-dpo-en" / "dpo_en_demo.json")
    assert len(found["duplicate-pair"]) == 5
    assert found["mojibake"] == [("[15]",)]
    _, found = places(material / "data" / "foundry-orca-dpo" / "validation.jsonl")
    assert found["mojibake"] == [(":129",), (":172",), (":188",)]
    assert "length-bias" in found
