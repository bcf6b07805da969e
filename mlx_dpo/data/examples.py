"""Parse data set rows into examples that are not tokenized; drop bad pairs or raise an error."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from mlx_dpo.data.report import PairsReport
from mlx_dpo.errors import ALWAYS_DROPPED, BadPairError, ConfigError, DataError
from mlx_dpo.schemas import find_schema, parse_row, parse_supervised, parse_unpaired
from mlx_dpo.schemas.labelled import pair_by_prompt
from mlx_dpo.schemas.messages import TEMPLATE_FIELDS
from mlx_dpo.schemas.pairs.compared import VERDICTS
from mlx_dpo.schemas.schema import Row, RowRules, Schema, format_names, rename_columns
from mlx_dpo.types import PreferenceExample, UnpairedExample

# Columns with the score of one completion: `score_chosen`, `chosen-score`, ….
SCORE_COLUMN_FORMATS = ("{}_{}", "{}-{}")


class ParsedExample(NamedTuple):
    """An example parsed from a row, with the target margin and the loss weight of the row."""

    example: PreferenceExample | UnpairedExample
    margin: float
    weight: float


def parse_rows(
    rows: Iterable[Row], rules: RowRules, report: PairsReport, *, bad_pairs: str = "error"
) -> Iterator[ParsedExample]:
    """Yield the examples of the rows in order; count rows and dropped pairs in `report`.

    With `rules.pair_labelled`, the pairs made from labelled rows come last.

    Raises:
        DataError: a row cannot be read.
        BadPairError: a pair cannot be trained on, and `bad_pairs` is `error`.
        ConfigError: a column is renamed to a field that the schema does not have.
    """
    unpaired: list[UnpairedExample] = []
    for row in (rename_columns(row, rules.renamed) for row in rows):
        schema = find_schema(row, rules)
        _count_row(row, schema, rules, report)
        if rules.pair_labelled and schema.has_labels:
            parsed: list[Any] = _parse_unpaired(row, schema, rules)
            unpaired += [example for example in parsed if not isinstance(example, BadPairError)]
            parsed = [bad for bad in parsed if isinstance(bad, BadPairError)]
        elif rules.judged or rules.supervised:
            parsed = _parse_unpaired(row, schema, rules)
        else:
            parsed = list(parse_row(row, rules, schema))
        for example in _drop_bad_pairs(parsed, report, bad_pairs):
            yield ParsedExample(example, _margin(row, example, rules), _weight(row, rules))
    for example in _drop_bad_pairs(pair_by_prompt(unpaired), report, bad_pairs):
        yield ParsedExample(example, 0.0, 1.0)


def drop_or_raise(bad: BadPairError, report: PairsReport, bad_pairs: str) -> None:
    """Raise the error `bad` if `bad_pairs` is `error`; otherwise count the pair as dropped.

    Ties, unmatched labels and pairs that are too long (`ALWAYS_DROPPED`) are always dropped.
    """
    if bad_pairs == "error" and bad.reason not in ALWAYS_DROPPED:
        raise bad
    report.drop(bad.location, bad.reason)


def _drop_bad_pairs(parsed: Iterable[Any], report: PairsReport, bad_pairs: str) -> Iterator[Any]:
    for example in parsed:
        if isinstance(example, BadPairError):
            drop_or_raise(example, report, bad_pairs)
        else:
            yield example


def _parse_unpaired(
    row: Row, schema: Schema, rules: RowRules
) -> list[UnpairedExample | BadPairError]:
    if schema.has_labels and not rules.supervised:
        # A row may have several labels, of which one bad example leaves the others.
        return [e for e in parse_row(row, rules, schema) if not isinstance(e, PreferenceExample)]
    parse = parse_supervised if rules.supervised else parse_unpaired
    try:
        return list(parse(row, rules, schema))
    except BadPairError as bad:
        return [bad]


def _count_row(row: Row, schema: Schema, rules: RowRules, report: PairsReport) -> None:
    """Count the row, its schema and its unused fields in the report.

    Raises:
        ConfigError: a column is renamed to a field that the schema does not have.
    """
    report.read += 1
    report.schemas[schema.name] += 1
    used = schema.fields | TEMPLATE_FIELDS | {rules.margin, rules.weight}
    if rules.margin is not None:
        used |= {name for columns in _score_columns(rules.margin) for name in columns}
    for name in rules.renamed:
        if name not in used:
            raise ConfigError(
                f"`column` {name}={rules.renamed[name]} has no effect; rows written as "
                f"{schema.name} have {format_names(dict.fromkeys(schema.fields))}"
            )
    if not schema.has_own_names:
        report.unused_fields.update(row.record.keys() - used)


def _score_columns(name: str) -> list[tuple[str, str]]:
    """Return the (chosen, rejected) column names that may hold the score called `name`."""
    return [
        (form.format(*chosen), form.format(*rejected))
        for form in SCORE_COLUMN_FORMATS
        for chosen, rejected in (
            ((name, "chosen"), (name, "rejected")),
            (("chosen", name), ("rejected", name)),
        )
    ]


def _margin(row: Row, example: PreferenceExample | UnpairedExample, rules: RowRules) -> float:
    """Return the row's target margin; 0 if no margin column is set.

    The target margin is the value of the margin column. In a row without that column, it is the
    score of chosen minus the score of rejected.
    """
    name = rules.margin
    if name is None:
        return 0.0
    gap = example.score_gap if isinstance(example, PreferenceExample) else None
    if name in VERDICTS and (gap is not None or _is_code(row.record.get(name))):
        return gap if gap is not None else _raise_code(row, name)
    if name not in row.record:
        for chosen, rejected in _score_columns(name):
            if chosen in row.record and rejected in row.record:
                return _number(row, chosen) - _number(row, rejected)
        if gap is not None:
            return gap
    margin = _number(row, name)
    if margin < 0:
        raise DataError(
            f"{row.location}: `{name}` must be a margin of at least 0, the amount by which "
            f"`chosen` is better (found {margin:g}); if `{name}` says which answer is better, use "
            "it to decide which answer is `chosen` and which is `rejected`"
        )
    return margin


def _is_code(value: Any) -> bool:
    """Return whether a value is one of the codes of a verdict, such as 1 and 2."""
    return str(value).strip() in ("0", "1", "2", "-1", "0.0", "1.0", "2.0", "-1.0")


def _raise_code(row: Row, name: str) -> NoReturn:
    raise DataError(
        f"{row.location}: `{name}` says which answer is better and is not a margin (found "
        f"{row.record[name]!r}); remove --margin-column, and any --column that maps the answers, "
        "and read such rows with --schema compared"
    )


def _weight(row: Row, rules: RowRules) -> float:
    return 1.0 if rules.weight is None else _number(row, rules.weight, minimum=0.0)


def _number(row: Row, name: str, *, minimum: float = -math.inf) -> float:
    """Return the row's column `name` as a finite number of at least `minimum`.

    Raises:
        DataError: the column is missing or has another value.
    """
    value = row.record.get(name)
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # the values of CSV are text
        except (ValueError, OverflowError):
            number = math.nan
    if math.isfinite(number) and number >= minimum:
        return number
    wanted = "a number" if minimum == -math.inf else f"a number of at least {minimum:g}"
    problem = "missing" if name not in row.record else f"found {value!r}"[:200]
    raise DataError(f"{row.location}: `{name}` must be {wanted} ({problem}); fix the row")
