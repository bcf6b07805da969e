"""OpenAI's form for preference fine-tuning: `input`, `preferred_output`, `non_preferred_output`."""

from typing import Any

from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import pair, turns_of
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema

FIELDS = frozenset({"input", "preferred_output", "non_preferred_output"})


def _input(record: Record) -> dict[str, Any]:
    given = record.get("input")
    return given if isinstance(given, dict) else {}


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    given = _input(row.record)
    if "messages" not in given:
        raise DataError(f"{row.location}: `input` must be an object with `messages`")
    prompt = turns_of(given["messages"], "input.messages", row.location)
    chosen, rejected = (
        turns_of(row.record.get(name), name, row.location)
        for name in ("preferred_output", "non_preferred_output")
    )
    for turn in (*chosen, *rejected):
        if turn["role"] != "assistant":
            raise DataError(
                f"{row.location}: an output holds a turn of `{turn['role']}`; it may hold only the "
                "assistant's turns"
            )
    return pair(row, prompt, chosen, rejected)


OPENAI = Schema(
    "openai",
    lambda record: "preferred_output" in record,
    _parse,
    FIELDS,
    tools=lambda record: _input(record).get("tools"),
)
