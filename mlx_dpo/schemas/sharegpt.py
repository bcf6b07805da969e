"""ShareGPT's way, as LLaMA-Factory and Axolotl read it: `conversations` of `from` and `value`."""

from typing import Any

from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import message_of, pair, parsed, text_of
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


def conversation(row: Row) -> tuple[Message, ...]:
    """The turns of `conversations`, after the row's own `system` if it has one.

    Raises:
        DataError: they are no list of turns.
    """
    turns = row.record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.location}: `conversations` must be a list of turns")
    read = tuple(turn(one, f"conversations[{i}]", row.location) for i, one in enumerate(turns))
    system = text_of(row.record.get("system") or "", "system", row.location)
    return ({"role": "system", "content": system}, *read) if system else read


def turn(value: Any, name: str, location: str) -> Message:
    """One turn as a message; a call of a function is the assistant's.

    Raises:
        DataError: it is none, or its role is unknown.
    """
    if isinstance(value, str):
        value = {"from": "gpt", "value": value}
    if isinstance(value, dict) and "role" in value:
        return message_of(value, name, location)
    if not isinstance(value, dict) or not isinstance(value.get("from"), str):
        raise DataError(f"{location}: `{name}` needs a `from` and a `value` that are text")
    if value["from"] not in ROLES:
        known = ", ".join(ROLES)
        raise DataError(f"{location}: `{name}` is from `{value['from']}`, not one of {known}")
    content = text_of(value.get("value"), name, location)
    message: dict[str, Any] = {"role": ROLES[value["from"]], "content": content}
    if value["from"] == "function_call":
        message = {
            "role": "assistant",
            "content": "",
            "tool_calls": _calls(content, name, location),
        }
    return message_of(message, name, location)


def _calls(text: str, name: str, location: str) -> list[dict[str, Any]]:
    calls = parsed(text, name, location)
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls]


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    prompt = conversation(row)
    chosen, rejected = (_reply(row, name) for name in ("chosen", "rejected"))
    return pair(row, prompt, chosen, rejected)


def _reply(row: Row, name: str) -> tuple[Message, ...]:
    value = row.record.get(name)
    reply = tuple(
        turn(one, name, row.location) for one in (value if isinstance(value, list) else [value])
    )
    if not reply or any(one["role"] != "assistant" for one in reply):
        raise DataError(f"{row.location}: `{name}` must be a turn of `gpt`")
    return reply


SHAREGPT = Schema(
    "sharegpt",
    lambda record: "conversations" in record and "chosen" in record,
    _parse,
    FIELDS,
)
