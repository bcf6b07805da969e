"""Schema of ShareGPT, as in LLaMA-Factory and Axolotl: turns with the fields `from` and `value`."""

from typing import Any

from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import (
    join_text_parts,
    make_pair,
    parse_json_field,
    parse_message,
    parse_text,
)
from mlx_dpo.schemas.schema import PairOrError, Row, RowRules, Schema
from mlx_dpo.types import Message

ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip
FIELDS = frozenset({"conversations", "chosen", "rejected", "system"})


def parse_conversation(row: Row) -> tuple[Message, ...]:
    """Return the messages of the field `conversations`, after the row's `system` if it has one.

    Raises:
        DataError: `conversations` is not a list of turns.
    """
    turns = row.record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.location}: `conversations` must be a list of turns")
    messages = tuple(
        parse_turn(turn, f"conversations[{i}]", row.location) for i, turn in enumerate(turns)
    )
    system = parse_text(row.record.get("system") or "", "system", row.location)
    return ({"role": "system", "content": system}, *messages) if system else messages


def parse_turn(value: Any, name: str, location: str) -> Message:
    """Parse a turn into a message; a function call becomes an assistant message with tool calls.

    Raises:
        DataError: the value is no turn, or its role is unknown.
    """
    if isinstance(value, str):
        value = {"from": "gpt", "value": value}
    if isinstance(value, dict) and "role" in value:
        return parse_message(value, name, location)
    if not isinstance(value, dict) or not isinstance(value.get("from"), str):
        raise DataError(f"{location}: `{name}` needs a text `from` and a text `value`")
    if value["from"] not in ROLES:
        known = ", ".join(ROLES)
        raise DataError(f"{location}: `{name}` is from `{value['from']}`, not one of {known}")
    content = value.get("value")
    if isinstance(content, list):
        content = join_text_parts(content, name, location)
    content = parse_text(content, name, location)
    message: dict[str, Any] = {"role": ROLES[value["from"]], "content": content}
    if value["from"] == "function_call":
        message = {
            "role": "assistant",
            "content": "",
            "tool_calls": _parse_function_calls(content, name, location),
        }
    return parse_message(message, name, location)


def _parse_function_calls(text: str, name: str, location: str) -> list[dict[str, Any]]:
    calls = parse_json_field(text, name, location)
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls]


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    prompt = parse_conversation(row)
    chosen, rejected = (_parse_reply(row, name) for name in ("chosen", "rejected"))
    return make_pair(row, prompt, chosen, rejected)


def _parse_reply(row: Row, name: str) -> tuple[Message, ...]:
    value = row.record.get(name)
    turns = value if isinstance(value, list) else [value]
    reply = tuple(parse_turn(turn, name, row.location) for turn in turns)
    if not reply or any(message["role"] != "assistant" for message in reply):
        raise DataError(f"{row.location}: `{name}` must be a turn of `gpt`")
    return reply


SHAREGPT = Schema(
    "sharegpt",
    lambda record: "conversations" in record and "chosen" in record,
    _parse,
    FIELDS,
)
