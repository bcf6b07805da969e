"""Rows -> what they say: preferences or judgements with margin and weight, and counted faults.

Text only: knows no tokenizer. Prints nothing.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from mlx_dpo.data import examples as judged
from mlx_dpo.data import schemas
from mlx_dpo.data.errors import ALWAYS_DROPPED, EMPTY_COMPLETION, UNPAIRED, BadPairError
from mlx_dpo.data.files import Row, format_names, rename_columns
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.schemas import TEMPLATE_FIELDS, Outcome, RowRules, Schema, outcomes
from mlx_dpo.data.schemas.messages import (
    as_turns,
    kind_of,
    pair,
    refuse_media,
    said,
    template_input,
    text_of,
    turns_of,
)
from mlx_dpo.data.schemas.sharegpt import conversation
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.types import PreferenceExample, Text, UnpairedExample

FIELDS = frozenset({"prompt", "completion", "messages", "conversations", "label"})
LABELS = {"true": True, "false": False, "1": True, "0": False}  # as CSV has them


def schema_of(row: Row, rules: RowRules = schemas.DEFAULT) -> Schema:
    """How the row is written: as a judged answer, or as a pair, which is two of them.

    Raises:
        DataError: it is neither.
    """
    if rules.schema == LABELLED.name or (rules.schema is None and "label" in row.record):
        return LABELLED
    return schemas.schema_of(row, rules)


def to_unpaired_examples(
    row: Row, schema: Schema, rules: RowRules = schemas.DEFAULT
) -> list[UnpairedExample]:
    """One judgement of a labelled row, two of a pair: chosen is good, rejected is bad.

    Raises:
        DataError: a field is missing or of another kind.
        BadPairError: the row says nothing.
    """
    if schema is not LABELLED:
        return [
            UnpairedExample(
                one.prompt, text, good, row.location, one.template_kwargs, one.implicit_prompt
            )
            for one in schemas.to_preferences(row, rules)
            for text, good in ((one.chosen, True), (one.rejected, False))
        ]
    refuse_media(row)
    desirable = _label(row)
    prompt, completion = _answer(row)
    if not said(completion):
        raise BadPairError(row.location, EMPTY_COMPLETION)
    given = template_input(row.record, row.record.get("tools"), row.location)
    return [UnpairedExample(prompt, completion, desirable, row.location, given)]


def _label(row: Row) -> bool:
    label = row.record.get("label")
    if isinstance(label, str):
        label = LABELS.get(label.strip().lower(), label)
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise DataError(f"{row.location}: `label` must be true or false, found {label!r}"[:300])
    return bool(label)


def _answer(row: Row) -> tuple[Text, Text]:
    """The prompt and the answer of a labelled row."""
    record = row.record
    for name in ("messages", "conversations"):
        if name not in record:
            continue
        turns = (
            conversation(row) if name != "messages" else turns_of(record[name], name, row.location)
        )
        *earlier, last = turns
        if last["role"] != "assistant" or not earlier:
            raise DataError(
                f"{row.location}: `{name}` must end with the assistant's answer to earlier turns, "
                f"found a turn of `{last['role']}`"
            )
        return tuple(earlier), (last,)
    for name in ("prompt", "completion"):
        if name not in record:
            raise DataError(
                f"{row.location}: a labelled row without `{name}`; add it, or `messages`"
            )
    prompt, completion = (_text(row, name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    return as_turns(prompt, "user"), as_turns(completion, "assistant")


def _text(row: Row, name: str) -> Text:
    value = row.record[name]
    if kind_of(value, name, row.location) == "text":
        return text_of(value, name, row.location)
    return turns_of(value, name, row.location)


def _no_pair(row: Row, rules: RowRules) -> list[Outcome]:
    raise DataError(f"{row.location}: a single judged answer, and no pair")


LABELLED = Schema("labelled", lambda record: "label" in record, _no_pair, FIELDS)


def pair_by_prompt(judgements: Iterable[UnpairedExample]) -> list[Outcome]:
    """The n-th good answer to a prompt beside the n-th bad one; those left over are faults."""
    by_prompt: defaultdict[str, tuple[list[UnpairedExample], list[UnpairedExample]]]
    by_prompt = defaultdict(lambda: ([], []))
    for one in judgements:
        by_prompt[schemas.prompt_digest(one)][not one.desirable].append(one)
    found: list[Outcome] = []
    for good, bad in by_prompt.values():
        for better, worse in zip(good, bad, strict=False):
            row = Row({}, f"{better.location} and {worse.location}")
            found += [
                replace(made, template_kwargs=better.template_kwargs)
                if not isinstance(made, BadPairError)
                else made
                for made in pair(row, better.prompt, better.completion, worse.completion)
            ]
        shorter = min(len(good), len(bad))
        found += [BadPairError(one.location, UNPAIRED) for one in (*good[shorter:], *bad[shorter:])]
    return found


SCORE_COLUMN_FORMATS = ("{}_{}", "{}-{}")  # of chosen and rejected, each with the name of a margin


class ParsedExample(NamedTuple):
    """What a row says, and how much."""

    example: PreferenceExample | UnpairedExample
    margin: float
    weight: float


def parse_rows(
    rows: Iterable[Row], rules: RowRules, report: PairsReport, *, bad_pairs: str = "error"
) -> Iterator[ParsedExample]:
    """Everything that the rows say, in their order; what is lost is counted in the report.

    Labelled rows come last where they are paired.

    Raises:
        DataError: a row cannot be read.
        BadPairError: a pair teaches nothing, and `bad_pairs` is `error`.
        ConfigError: a column is renamed to what no row is read by.
    """
    single: list[UnpairedExample] = []
    for row in (rename_columns(row, rules.renamed) for row in rows):
        schema = _schema_of(row, rules)
        _count(row, schema, rules, report)
        if rules.pair_labelled and schema is judged.LABELLED:
            found: list[Any] = _judgements(row, schema, rules)
            single += [one for one in found if not isinstance(one, BadPairError)]
            found = [one for one in found if isinstance(one, BadPairError)]
        elif rules.judged:
            found = _judgements(row, schema, rules)
        else:
            found = list(outcomes(row, rules, schema))
        for one in _kept(found, report, bad_pairs):
            yield ParsedExample(one, _margin(row, one, rules), _weight(row, rules))
    for one in _kept(judged.pair_by_prompt(single), report, bad_pairs):
        yield ParsedExample(one, 0.0, 1.0)


def drop_or_raise(bad: BadPairError, report: PairsReport, bad_pairs: str) -> None:
    """Count a pair that is lost; BadPairError if it is not to be."""
    if bad_pairs == "error" and bad.reason not in ALWAYS_DROPPED:
        raise bad
    report.drop(bad.location, bad.reason)


def _kept(found: Iterable[Any], report: PairsReport, bad_pairs: str) -> Iterator[Any]:
    for one in found:
        if isinstance(one, BadPairError):
            drop_or_raise(one, report, bad_pairs)
        else:
            yield one


def _schema_of(row: Row, rules: RowRules) -> Schema:
    labelled = rules.judged or (rules.pair_labelled and "chosen" not in row.record)
    if labelled or rules.schema == judged.LABELLED.name:
        return judged.schema_of(row, rules)
    return schemas.schema_of(row, rules)


def _judgements(row: Row, schema: Schema, rules: RowRules) -> list[UnpairedExample | BadPairError]:
    try:
        return list(judged.to_unpaired_examples(row, schema, rules))
    except BadPairError as bad:
        return [bad]


def _count(row: Row, schema: Schema, rules: RowRules, report: PairsReport) -> None:
    report.read += 1
    report.schemas[schema.name] += 1
    read = schema.fields | TEMPLATE_FIELDS | {rules.margin, rules.weight}
    if rules.margin is not None:
        read |= {name for pair in _sides(rules.margin) for name in pair}
    for name in rules.renamed:
        if name not in read:
            raise ConfigError(
                f"`column` {name}={rules.renamed[name]} has no effect; rows written as "
                f"{schema.name} have {format_names(dict.fromkeys(schema.fields))}"
            )
    report.unused_fields.update(row.record.keys() - read)


def _sides(name: str) -> list[tuple[str, str]]:
    """Names under which chosen and rejected may each have a rating."""
    return [
        (form.format(*chosen), form.format(*rejected))
        for form in SCORE_COLUMN_FORMATS
        for chosen, rejected in (
            ((name, "chosen"), (name, "rejected")),
            (("chosen", name), ("rejected", name)),
        )
    ]


def _margin(row: Row, one: PreferenceExample | UnpairedExample, rules: RowRules) -> float:
    """The field itself, or the ratings of both sides, or those that a list was ranked by."""
    name = rules.margin
    if name is None:
        return 0.0
    if name not in row.record:
        for chosen, rejected in _sides(name):
            if chosen in row.record and rejected in row.record:
                return _number(row, chosen) - _number(row, rejected)
        if isinstance(one, PreferenceExample) and one.score_gap is not None:
            return one.score_gap
    return _number(row, name)


def _weight(row: Row, rules: RowRules) -> float:
    return 1.0 if rules.weight is None else _number(row, rules.weight, least=0.0)


def _number(row: Row, name: str, *, least: float = -math.inf) -> float:
    value = row.record.get(name)
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # CSV has text alone
        except (ValueError, OverflowError):
            number = math.nan
    if math.isfinite(number) and number >= least:
        return number
    wanted = "a number" if least == -math.inf else f"a number of at least {least:g}"
    found = "missing" if name not in row.record else f"found {value!r}"[:200]
    raise DataError(f"{row.location}: `{name}` must be {wanted} ({found}); mend the row")
