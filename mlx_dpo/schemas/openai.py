"""Schema of OpenAI's preference fine-tuning: `input`, preferred and non-preferred output."""

from contextlib import suppress
from typing import Any

from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import make_pair, parse_json_field, parse_messages
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema

FIELDS = frozenset({"input", "preferred_output", "non_preferred_output"})


def _get_input(record: Record) -> dict[str, Any]:
    input_ = record.get("input")
    if isinstance(input_, str) and input_.lstrip().startswith("{"):  # as in CSV
        with suppress(DataError):
            input_ = parse_json_field(input_, "input", "")
    return input_ if isinstance(input_, dict) else {}


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    input_ = _get_input(row.record)
    if "messages" not in input_:
        raise DataError(f"{row.location}: `input` must be an object with `messages`")
    prompt = parse_messages(input_["messages"], "input.messages", row.location)
    chosen, rejected = (
        parse_messages(row.record.get(name), name, row.location)
        for name in ("preferred_output", "non_preferred_output")
    )
    for turn in (*chosen, *rejected):
        if turn["role"] != "assistant":
            raise DataError(
                f"{row.location}: an output holds a turn of `{turn['role']}`; it may hold only the "
                "assistant's turns"
            )
    return make_pair(row, prompt, chosen, rejected)


OPENAI = Schema(
    "openai",
    lambda record: "preferred_output" in record,
    _parse,
    FIELDS,
    tools=lambda record: _get_input(record).get("tools"),
)
