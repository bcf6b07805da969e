"""What a way of writing preferences is: a name, a shape to know it by, and how it is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_dpo.data.errors import BadPairError
from mlx_dpo.data.files import Row
from mlx_dpo.types import PreferenceExample

Record = Mapping[str, Any]
Ranking = Literal["best_worst", "all", "adjacent"]


@dataclass(frozen=True)
class RowRules:
    """The settings under which rows become preferences."""

    judged: bool = False  # answers are judged one by one
    pair_labelled: bool = False  # good answers meet bad ones of the same prompt
    margin: str | None = None  # field that says how much better chosen is
    weight: str | None = None  # field that says how much the row counts
    schema: str | None = None  # as which rows are read, whatever they look like
    ranked: Ranking | None = None  # which pairs a list of rated completions makes
    renamed: Mapping[str, str] = field(default_factory=dict)  # new name of a field: where it is


Outcome = PreferenceExample | BadPairError  # a pair, or what is wrong with what would have been one


@dataclass(frozen=True)
class Schema:
    """One way of writing preferences."""

    name: str  # as `--schema` takes it
    fits: Callable[[Record], bool]  # whether a row looks like it
    read: Callable[[Row, RowRules], list[Outcome]]
    fields: frozenset[str]  # of a row that are read
    tools: Callable[[Record], Any] = lambda record: record.get("tools")
