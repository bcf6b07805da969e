"""Rows -> what they say: preferences or judgements with margin and weight, and counted faults.

Text only: knows no tokenizer. Prints nothing.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mlx_dpo.data.report import PairsReport
from mlx_dpo.errors import (
    ALWAYS_DROPPED,
    BadPairError,
    ConfigError,
    DataError,
)
from mlx_dpo.schemas import find_schema, parse_row, parse_unpaired
from mlx_dpo.schemas.messages import (
    TEMPLATE_FIELDS,
)
from mlx_dpo.schemas.schema import Row, RowRules, Schema, format_names, rename_columns
from mlx_dpo.schemas.unpaired import pair_by_prompt
from mlx_dpo.types import PreferenceExample, UnpairedExample

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
        schema = find_schema(row, rules)
        _count(row, schema, rules, report)
        if rules.pair_labelled and schema.unpaired:
            found: list[Any] = _judgements(row, schema, rules)
            single += [one for one in found if not isinstance(one, BadPairError)]
            found = [one for one in found if isinstance(one, BadPairError)]
        elif rules.judged:
            found = _judgements(row, schema, rules)
        else:
            found = list(parse_row(row, rules, schema))
        for one in _kept(found, report, bad_pairs):
            yield ParsedExample(one, _margin(row, one, rules), _weight(row, rules))
    for one in _kept(pair_by_prompt(single), report, bad_pairs):
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


def _judgements(row: Row, schema: Schema, rules: RowRules) -> list[UnpairedExample | BadPairError]:
    try:
        return list(parse_unpaired(row, rules, schema))
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
