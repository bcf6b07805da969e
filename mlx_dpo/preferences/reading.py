"""Rows -> what they say: preferences or judgements with margin and weight, and counted faults.

Text only: knows no tokenizer. Prints nothing.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.preferences import judged
from mlx_dpo.preferences.faults import ASKED_FOR, BadPair
from mlx_dpo.preferences.report import PairsReport
from mlx_dpo.preferences.rows import Row, listed, renamed
from mlx_dpo.preferences.schemas import TEMPLATE_FIELDS, RowRules, Schema, outcomes
from mlx_dpo.types import Judgement, Preference

SIDES = ("{}_{}", "{}-{}")  # of chosen and rejected, each with the name of a margin


class Told(NamedTuple):
    """What a row says, and how much."""

    said: Preference | Judgement
    margin: float
    weight: float


def told(
    rows: Iterable[Row], rules: RowRules, report: PairsReport, *, bad_pairs: str = "error"
) -> Iterator[Told]:
    """Everything that the rows say, in their order; what is lost is counted in the report.

    Labelled rows come last where they are paired.

    Raises:
        DataError: a row cannot be read.
        BadPair: a pair teaches nothing, and `bad_pairs` is `error`.
        ConfigError: a column is renamed to what no row is read by.
    """
    single: list[Judgement] = []
    for row in (renamed(row, rules.renamed) for row in rows):
        schema = _schema_of(row, rules)
        _count(row, schema, rules, report)
        if rules.pair_labelled and schema is judged.LABELLED:
            found: list[Any] = _judgements(row, schema, rules)
            single += [one for one in found if not isinstance(one, BadPair)]
            found = [one for one in found if isinstance(one, BadPair)]
        elif rules.judged:
            found = _judgements(row, schema, rules)
        else:
            found = list(outcomes(row, rules, schema))
        for one in _kept(found, report, bad_pairs):
            yield Told(one, _margin(row, one, rules), _weight(row, rules))
    for one in _kept(judged.paired(single), report, bad_pairs):
        yield Told(one, 0.0, 1.0)


def keep_or_raise(bad: BadPair, report: PairsReport, bad_pairs: str) -> None:
    """Count a pair that is lost; BadPair if it is not to be."""
    if bad_pairs == "error" and bad.reason not in ASKED_FOR:
        raise bad
    report.drop(bad.where, bad.reason)


def _kept(found: Iterable[Any], report: PairsReport, bad_pairs: str) -> Iterator[Any]:
    for one in found:
        if isinstance(one, BadPair):
            keep_or_raise(one, report, bad_pairs)
        else:
            yield one


def _schema_of(row: Row, rules: RowRules) -> Schema:
    labelled = rules.judged or (rules.pair_labelled and "chosen" not in row.record)
    if labelled or rules.schema == judged.LABELLED.name:
        return judged.schema_of(row, rules)
    return judged.schemas.schema_of(row, rules)


def _judgements(row: Row, schema: Schema, rules: RowRules) -> list[Judgement | BadPair]:
    try:
        return list(judged.to_judgements(row, schema, rules))
    except BadPair as bad:
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
                f"{schema.name} have {listed(dict.fromkeys(schema.fields))}"
            )
    report.unused_fields.update(row.record.keys() - read)


def _sides(name: str) -> list[tuple[str, str]]:
    """Names under which chosen and rejected may each have a rating."""
    return [
        (form.format(*chosen), form.format(*rejected))
        for form in SIDES
        for chosen, rejected in (
            ((name, "chosen"), (name, "rejected")),
            (("chosen", name), ("rejected", name)),
        )
    ]


def _margin(row: Row, one: Preference | Judgement, rules: RowRules) -> float:
    """The field itself, or the ratings of both sides, or those that a list was ranked by."""
    name = rules.margin
    if name is None:
        return 0.0
    if name not in row.record:
        for chosen, rejected in _sides(name):
            if chosen in row.record and rejected in row.record:
                return _number(row, chosen) - _number(row, rejected)
        if isinstance(one, Preference) and one.lead is not None:
            return one.lead
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
    raise DataError(f"{row.where}: `{name}` must be {wanted} ({found}); mend the row")
