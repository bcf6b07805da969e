"""Types for parsing data sets: `Row`, the settings `RowRules`, and `Schema`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from mlx_dpo.errors import BadPairError, DataError
from mlx_dpo.types import PreferenceExample, UnpairedExample

Record = Mapping[str, Any]
Ranking = Literal["best_worst", "all", "adjacent"]
OTHER_NAMES = {  # field of a pair -> names that data sets give it, which an error suggests
    "prompt": ("question", "instruction", "query", "input", "context", "request"),
    "chosen": ("good", "better", "preferred", "accepted", "positive", "winner", "best"),
    "rejected": ("bad", "worse", "dispreferred", "unpreferred", "negative", "loser", "worst"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a data set, with its location in the data source."""

    record: dict[str, Any]
    location: str  # `file:line`, `file[index]` counted from 0, or `org/name:split[index]`


@dataclass(frozen=True)
class RowRules:
    """Settings for parsing rows into preference pairs or unpaired examples."""

    judged: bool = False  # make unpaired examples (for KTO): one per labelled row, two per pair
    supervised: bool = False  # make one good example of each row or pair (for SFT)
    assistant_turns: str = "all"  # turns of a conversation that SFT scores, or `last`
    pair_labelled: bool = False  # pair good and bad labelled completions of the same prompt
    margin: str | None = None  # field that says how much better chosen is
    weight: str | None = None  # field that says how much the row counts
    schema: str | None = None  # name of the schema; None: find it by the row's shape
    ranked: Ranking | None = None  # pairs to make of a list of rated completions
    renamed: Mapping[str, str] = field(default_factory=dict)  # field name -> column that holds it


DEFAULT_RULES = RowRules()

PairOrError = PreferenceExample | BadPairError  # the error says why the pair cannot be trained on
Parsed = PreferenceExample | UnpairedExample | BadPairError


@dataclass(frozen=True)
class Schema:
    """A format of data set rows, with the functions that recognize and parse such a row."""

    name: str  # value of `--schema`
    fits: Callable[[Record], bool]  # recognizes a row by its shape
    parse: Callable[[Row, RowRules], list[Any]]  # list of `Parsed`
    fields: frozenset[str]  # names of the fields that `parse` reads
    tools: Callable[[Record], Any] = lambda record: record.get("tools")
    lists: frozenset[str] = frozenset()  # fields that are lists or objects, and never text
    unpaired: bool = False  # rows hold one labelled completion instead of a pair
    has_labels: bool = False  # rows can give labelled completions, if `RowRules` asks for them
    has_ranks: bool = False  # rows can hold ranked lists
    has_own_names: bool = False  # rows name some fields as they like; none counts as unused


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row with renamed columns; `columns` maps each new name to the old name.

    A dotted old name such as `input.question` denotes a field of a nested object, which stays in
    that object, too. Other columns lose their old name.

    Raises:
        DataError: the row has no column with an old name.
    """
    if not columns:
        return row
    for new, old in columns.items():
        if old not in row.record and new in row.record and old in OTHER_NAMES:
            raise DataError(
                f"{row.location}: no column `{old}` (found {format_names(row.record)}); the name "
                f"of the field comes first: --column {old}={new}"
            )
    values = {new: _get_column(row, old) for new, old in columns.items()}
    others = {name: value for name, value in row.record.items() if name not in columns.values()}
    return Row(others | values, row.location)


def _get_column(row: Row, name: str) -> Any:
    if name in row.record:
        return row.record[name]
    value: Any = row.record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise DataError(
                f"{row.location}: no column `{name}` (found {format_names(row.record)})"
                + suggest_column(name, row.record)
            )
        value = value[part]
    return value


def suggest_column(name: str, columns: Iterable[str]) -> str:
    """Return the question whether the most similar column was meant; "" if none is similar."""
    near = get_close_matches(name, columns, n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def suggest_columns(record: Record) -> str:
    """Return the question whether columns with usual other names hold a pair; "" if none do."""
    found = {
        field: next((name for name in names if name in record), "")
        for field, names in OTHER_NAMES.items()
        if field not in record
    }
    if not all(name for field, name in found.items() if field != "prompt"):
        return ""
    columns = [f"--column {field}={name}" for field, name in found.items() if name]
    return f"did you mean {' '.join(columns)}?"


def format_names(names: Mapping[str, Any]) -> str:
    """Return the names, sorted and in backticks, or `nothing` if there is none."""
    return ", ".join(f"`{name}`" for name in sorted(names)) or "nothing"
