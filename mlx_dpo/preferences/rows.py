"""A row: one object of a source, with the place it came from. Knows no field names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_dpo.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a source."""

    record: dict[str, Any]
    where: str  # `file:line`, `file[index]` counted from 0, or `org/name:split[index]`


def renamed(row: Row, names: Mapping[str, str]) -> Row:
    """The row with fields under other names: `names` has the new one and where it is now.

    A dotted name reaches into objects. The field keeps its old name only if that is dotted.

    Raises:
        DataError: there is no such field; says which there are.
    """
    if not names:
        return row
    values = {new: _at(row, old) for new, old in names.items()}
    kept = {name: value for name, value in row.record.items() if name not in names.values()}
    return Row(kept | values, row.where)


def _at(row: Row, name: str) -> Any:
    if name in row.record:
        return row.record[name]
    value: Any = row.record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise DataError(f"{row.where}: no column `{name}` (found {listed(row.record)})")
        value = value[part]
    return value


def listed(names: Mapping[str, Any]) -> str:
    """The names in backticks, or `nothing`."""
    return ", ".join(f"`{name}`" for name in sorted(names)) or "nothing"
