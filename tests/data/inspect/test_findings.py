"""Every finding: a row that has it, and one that nearly has it."""

import json
from dataclasses import dataclass, field

import pytest

from mlx_dpo import errors as faults
from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.inspect.findings import (
    CHECK_OF_REASON,
    CHECKS,
    MAX_DETAILS,
    OTHER_DETAILS,
    FindingLog,
)
from mlx_dpo.data.inspect.results import Finding, list_findings, run_checks
from mlx_dpo.data.inspect.scan import ScanSettings
from mlx_dpo.data.sources import find_sources
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.schemas.schema import RowRules
from tests.data.byte_tokenizer import CHAT, ByteTokenizer

GOOD = {"prompt": "Which way?", "chosen": "That way.", "rejected": "No way!"}
LONG = "It is the way that everybody goes who has ever been here."
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ gone }}{% endif %}" + CHAT
CHANGES_QUESTIONS = (
    "{% for m in messages %}{{ mark[m.role] }}{{ m.content }}"
    "{% if loop.length > 1 and '!' in m.content %} {% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)
NO_SYSTEM = CHAT.replace("in messages", "in messages if m.role != 'system'")
NO_STOP = CHAT.replace("</s>", "")


class NoSnowman(ByteTokenizer):
    """A tokenizer that leaves out a character."""

    def encode(self, text, add_special_tokens=True, split_special_tokens=False):
        return super().encode(text.replace("☃", ""), add_special_tokens, split_special_tokens)


@dataclass
class Case:
    """Rows of which the last has the finding, and the last of which nearly has it."""

    has: list
    near: list
    template: str | None = CHAT
    tokens: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)
    context: int | None = None
    valid: list | None = None
    with_model: bool = True
    tokenizer: type = ByteTokenizer


def like(**fields):
    return GOOD | fields


def answered(text):
    return like(chosen=text)


def turns(role, text):
    return [{"role": role, "content": text}, {"role": "user", "content": "Which way?"}]


def judged(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def compared(**annotation):
    result = {"type": "pairwise", "value": {"selected": "left"}, "to_name": "answer1,answer2"}
    return {
        "data": {"prompt": "p", "answer1": "a", "answer2": "b"},
        "annotations": [{"result": [result]} | annotation],
    }


def rated(*scores):
    return {"prompt": "p", "completions": [f"a{i}" for i in range(len(scores))], "scores": scores}


TEXT = {"template": None, "tokens": {"chat_template": "text"}}
KTO = {"rows": {"judged": True}}
# The prompt makes 12 tokens of the template, an answer one more than characters.
CASES = {
    "unreadable": Case(["{"], [json.dumps(GOOD)]),
    "untrainable": Case([like(prompt=turns("user", "?"))], [GOOD], template=None),
    "empty-completion": Case([answered(" \n")], [answered(".")]),
    "same-text": Case([answered("No way!")], [answered("No way.")]),
    "same-tokens": Case(
        [answered("No way!</s>")], [answered("No way!</s>.")], template=None
    ),
    "different-prompts": Case(
        [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}],
        [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}],
    ),
    "empty-prompt": Case([like(prompt=" ")], [like(prompt="?")]),
    "not-text": Case([like(images=["a.png"])], [like(images=[])]),
    "template-refused": Case(
        [like(prompt=turns("system", "Be kind."))],
        [like(prompt=turns("user", "Be kind."))],
        template=REFUSES_SYSTEM,
    ),
    "template-drops-content": Case(
        [like(prompt=turns("system", "Be kind."))],
        [like(prompt=turns("user", "Be kind."))],
        template=NO_SYSTEM,
    ),
    "prompt-not-prefix": Case(
        [like(prompt="Which way!")], [GOOD], template=CHANGES_QUESTIONS
    ),
    "active-special-token": Case([answered("\U00100000</s>")], [answered("\U00100000< /s>")]),
    "prompt-too-long": Case([like(prompt="Which way??")], [GOOD], tokens={"max_length": 14}),
    "same-after-truncation": Case(
        [answered("No way?")], [answered("No Way!")], tokens={"max_length": 13 + 4}
    ),
    "longer-than-context": Case([answered("That way, now.")], [GOOD], context=13 + 10),
    "double-bos": Case([like(prompt="<s><s>a")], [like(prompt="<s>a<s>")], **TEXT),
    "double-eos": Case([answered("a</s></s>")], [answered("</s>a</s>")], **TEXT),
    "duplicate-pair": Case(
        [GOOD, like(chosen="That way. ")], [GOOD, like(chosen="That way, ")]
    ),
    "contradiction": Case(
        [GOOD, like(chosen="No way!", rejected="That way.")],
        [GOOD, like(chosen="No way.", rejected="That way.")],
    ),
    "leaked-prompt": Case([GOOD], [like(prompt="Which way then?")], valid=[like(chosen="Up.")]),
    "replacement-character": Case([answered("caf\ufffd")], [answered("café")]),
    "mojibake": Case([answered("cafÃ©")], [answered("„Spaß“, SÃO, «é»")]),
    "control-character": Case([answered("a\x08b")], [answered("a\tb\r\n")]),
    "invisible-character": Case([answered("a\u200bb")], [answered("👩\u200d🌾 a b")]),
    "refusal": Case([answered("I can’t help with it.")], [like(rejected="I can't help.")]),
    "leaked-answer": Case(
        [answered(LONG)], [answered(LONG[:39])],
        valid=[{"prompt": "?", "chosen": LONG[:39], "rejected": f" {LONG}"}],
    ),
    "duplicate-prompt": Case(
        [GOOD, like(chosen="Up.")], [GOOD, like(prompt="Which way? ", chosen="Up.")]
    ),
    "both-labels": Case(
        [judged("p", "a", True), judged("p", "b", False)],
        [judged("p", "a", True), judged("p", "b", True)],
        **KTO,
    ),
    "special-token": Case([answered("a</s>b")], [answered("a</ s>b")]),
    "template-drops-field": Case(
        [like(prompt=[{"role": "user", "content": "Which way?", "name": "Ann"}])], [GOOD]
    ),
    "unknown-token": Case([answered("a☃b")], [answered("aéb")], tokenizer=NoSnowman),
    "missing-eos": Case([GOOD], [answered("That way.</s>")], template=NO_STOP,
                         tokens={"chat_template": "auto"}),
    "truncated": Case([answered("That way, now.")], [GOOD], tokens={"max_length": 13 + 10}),
    "too-long": Case(
        [GOOD, answered("That way, now.")], [GOOD],
        tokens={"max_length": 13 + 10, "truncation": "drop"},
    ),
    "tied": Case([rated(1, 2), rated(1, 1)], [rated(1, 2), rated(2, 1)]),
    "unpaired": Case(
        [judged("p", "a", True), judged("p", "b", False), judged("p", "c", True)],
        [judged("p", "a", True), judged("p", "b", False)],
        rows={"pair_labelled": True},
    ),
    "unjudged": Case([compared(), compared(was_cancelled=True)], [compared()]),
    "length-bias": Case(
        [like(prompt=str(i)) for i in range(10)],
        [like(prompt=str(i), chosen="ab" * (i % 2) + "abcdefg") for i in range(10)],
    ),
}  # fmt: skip


def checked(case, rows, write):
    path = write(*rows)
    valid = None if case.valid is None else str(write(*case.valid, name="valid.jsonl"))
    tokenizer = case.tokenizer(case.template, adds_bos=case.template is None)
    settings = ScanSettings(
        rows=RowRules(**case.rows),
        tokens=TokenRules(vocab_size=262, **case.tokens) if case.with_model else None,
        tokenizer=tokenizer,
        context_length=case.context,
    )
    return run_checks(find_sources(str(path), valid), settings)


def found(case, rows, write):
    split = checked(case, rows, write).train
    return {finding.check.name: list(finding.locations()) for finding in list_findings(split)}


def test_every_check_has_a_case_and_every_reason_of_a_bad_pair_has_a_check():
    assert CASES.keys() == CHECKS.keys()
    reasons = {
        value for name, value in vars(faults).items()
        if name.isupper() and isinstance(value, str)
    }  # fmt: skip
    assert CHECK_OF_REASON.keys() == reasons
    assert set(CHECK_OF_REASON.values()) <= CHECKS.keys()


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"length-bias", "unpaired", "missing-eos"}))
def test_a_finding_has_its_location_and_a_similar_row_has_no_finding(name, write):
    case = CASES[name]
    places = found(case, case.has, write)[name]
    assert f"pairs.jsonl:{len(case.has)}" in {where for where, _ in places}
    assert name not in found(case, case.near, write)


@pytest.mark.parametrize("name", ["mojibake", "refusal", "duplicate-pair", "empty-completion"])
def test_checks_of_texts_run_without_a_model(name, write):
    case = CASES[name]
    case = Case(case.has, case.near, with_model=False)
    assert name in found(case, case.has, write)
    assert name not in found(case, case.near, write)


def test_length_bias_is_a_finding_of_all_pairs(write):
    case = CASES["length-bias"]
    assert found(case, case.has, write)["length-bias"] == []
    # Nine of nine could be tossed once in 256 times: three standard deviations are ten.
    assert "length-bias" not in found(case, case.has[:9], write)
    assert "length-bias" not in found(case, case.near, write)


def test_labelled_rows_without_a_partner_are_found(write):
    case = CASES["unpaired"]
    assert found(case, case.has, write)["unpaired"] == [("pairs.jsonl:3", None)]
    assert found(case, case.near, write) == {}


def test_a_template_without_stop_token_is_found_unless_the_text_has_one(write):
    case = CASES["missing-eos"]
    assert found(case, case.has, write)["missing-eos"] == [("pairs.jsonl:1", None)]
    assert "missing-eos" not in found(CASES["refusal"], [GOOD], write)
    assert "missing-eos" not in found(CASES["same-tokens"], [GOOD], write)  # plain text


def test_related_locations_are_reported_together(write):
    rows = [GOOD, like(prompt="?"), GOOD, like(chosen="No way!", rejected="That way.")]
    places = found(Case(rows, []), rows, write)
    assert places["duplicate-pair"] == [("pairs.jsonl:3", "pairs.jsonl:1")]
    assert places["contradiction"] == [
        ("pairs.jsonl:1", "pairs.jsonl:4"),
        ("pairs.jsonl:3", "pairs.jsonl:4"),
        ("pairs.jsonl:4", "pairs.jsonl:1"),
    ]
    # The third brings its prompt along; that is no news.
    assert places["duplicate-prompt"] == [("pairs.jsonl:4", "pairs.jsonl:1")]


def test_pairs_of_one_row_are_no_duplicates(write):
    rows = [rated(1, 2, 3)]
    assert found(Case(rows, [], rows={"ranked": "all"}), rows, write) == {}
    rows = [rated(3, 2, 1) | {"completions": ["a", "a", "b"]}]
    found_there = found(Case(rows, [], rows={"ranked": "all"}), rows, write)
    assert found_there.keys() == {"same-text"}  # but not the second `a` before `b`
    assert found(CASES["both-labels"], [GOOD], write) == {}


def test_the_same_completion_with_both_labels_is_a_contradiction(write):
    rows = [judged("p", "a", True), judged("q", "a", False), judged("p", "a", False)]
    places = found(Case(rows, [], **KTO), rows, write)
    assert places["contradiction"] == [
        ("pairs.jsonl:1", "pairs.jsonl:3"),
        ("pairs.jsonl:3", "pairs.jsonl:1"),
    ]


def test_leaks_are_reported_at_the_training_row_with_the_held_out_row(write):
    case = CASES["leaked-prompt"]
    both = checked(case, case.has, write)
    assert list(both.train.log.locations("leaked-prompt")) == [("pairs.jsonl:1", "valid.jsonl:1")]
    assert both.valid is not None
    assert "leaked-prompt" not in {finding.check.name for finding in list_findings(both.valid)}


def test_chosen_and_rejected_completions_can_leak(write):
    texts = [f"{LONG} {i}" for i in range(4)]
    valid = [{"prompt": str(i), "chosen": texts[i], "rejected": texts[i + 1]} for i in (0, 2)]
    for i, text in enumerate(texts):
        case = Case([answered(text)], [], valid=valid)
        where = f"valid.jsonl:{1 + i // 2}"
        assert found(case, case.has, write)["leaked-answer"] == [("pairs.jsonl:1", where)]


def test_only_faults_are_counted_and_they_come_first(write):
    assert checked(CASES["refusal"], CASES["refusal"].has, write).error_count == 0
    both = [answered("I can't, cafÃ©"), answered("I can't"), like(prompt="a\u200b")]
    both += [like(prompt="a", chosen="\x08")]
    result = checked(Case(both, []), both, write)
    assert result.error_count == 2
    kinds = [
        (finding.check.name, finding.check.severity) for finding in list_findings(result.train)
    ]
    assert kinds == [
        ("mojibake", "error"),
        ("control-character", "error"),
        ("invisible-character", "warning"),
        ("refusal", "warning"),
        ("duplicate-prompt", "warning"),
    ]


def test_a_rejected_refusal_is_no_warning(write):
    rows = [judged("p", "I can't.", False), judged("q", "I can't.", True)]
    assert found(Case(rows, [], **KTO), rows, write)["refusal"] == [("pairs.jsonl:2", None)]


def test_a_small_length_bias_is_no_warning_even_if_significant(write):
    rows = [like(prompt=str(i), chosen="yes" * (1 + 9 * (i % 100 < 59))) for i in range(400)]
    for more, named in ((rows, False), (rows + [like(prompt=f"{i}!") for i in range(20)], True)):
        split = checked(Case(more, [], with_model=False), more, write).train
        assert split.lengths.bias().is_significant
        assert ("length-bias" in {finding.check.name for finding in list_findings(split)}) is named


def test_rows_and_pairs_are_counted_separately(write):
    rows = [rated(1, 2, 3), "{", answered(""), answered("I can't.")]
    split = checked(Case(rows, [], rows={"ranked": "adjacent"}), rows, write).train
    assert (split.rows, split.pairs) == (4, 3)
    shares = {
        finding.check.name: (finding.count, finding.total, finding.share)
        for finding in list_findings(split)
    }
    assert shares == {
        "unreadable": (1, 4, 0.25), "empty-completion": (1, 4, 0.25), "refusal": (1, 3, 1 / 3),
    }  # fmt: skip


def test_lengths_are_those_before_truncation(write):
    rows = [answered("x" * 99)]
    split = checked(Case(rows, [], tokens={"max_length": 20}), rows, write).train
    summaries = split.lengths.summaries()
    assert {part: spread.longest for part, spread in summaries.items()} == {
        "prompt": 13, "chosen": 100, "rejected": 8,
    }  # fmt: skip
    dropped = checked(
        Case(rows, [], tokens={"max_length": 20, "truncation": "drop"}), rows, write
    ).train
    assert (dropped.pairs, dropped.lengths.summaries()) == (0, summaries)


def test_details_beyond_the_maximum_are_counted_together():
    log = FindingLog(RowLocations())
    for i in range(MAX_DETAILS + 5):
        log.add_detail("unreadable", f"message {i}")
    log.add_detail("unreadable", "message 0")
    assert len(log.details["unreadable"]) == MAX_DETAILS + 1
    assert log.details["unreadable"][OTHER_DETAILS] == 5
    assert log.details["unreadable"]["message 0"] == 2
    details = Finding(CHECKS["unreadable"], 1, 1, log).details
    assert next(iter(details)) == "message 0" and list(details)[-1] == OTHER_DETAILS
