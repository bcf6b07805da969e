"""Checks of the messages and tools of a chat request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dpo.chat.field_types import shorten
from mlx_dpo.errors import DataError
from mlx_dpo.schemas.tool_calls import has_invalid_arguments, normalize_tool_calls

ROLES = ("developer", "system", "user", "assistant", "tool", "function")
MAX_TOOLS = 128  # OpenAI's limit
TEXT_PARTS = ("text",)


@dataclass(frozen=True)
class Messages:
    """The messages of a chat: a non-empty list of objects, which may contain only text."""

    def parse(self, value: Any) -> list[dict[str, Any]]:
        """Return the messages without nulls; raise `ValueError` if one of them is wrong."""
        return _parse_list(value, "messages", _parse_message)


@dataclass(frozen=True)
class Tools:
    """The functions that the model may call."""

    def parse(self, value: Any) -> list[dict[str, Any]]:
        """Return the tools; raise `ValueError` if one of them is not a function."""
        if value == []:
            return []
        tools = _parse_list(value, "tools", _parse_tool)
        if len(tools) > MAX_TOOLS:
            raise ValueError(f"must have at most {MAX_TOOLS} entries, found {len(tools)}")
        return tools


def _parse_list(
    value: Any, name: str, parse: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    is_list = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    if not is_list or not value:
        raise ValueError(f"must be a non-empty list of objects, found {shorten(value)}")
    entries = []
    for index, entry in enumerate(value):
        try:
            entries.append(parse({k: v for k, v in entry.items() if v is not None}))
        except ValueError as error:
            raise ValueError(f"are wrong: `{name}[{index}]` {error}") from None
    return entries


def _parse_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without nulls, with tool calls in one form; other keys are not checked."""
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"must have a `role` of {', '.join(ROLES)} (found {shorten(role)})")
    for name in ("name", "tool_call_id", "refusal"):
        if not isinstance(message.get(name, ""), str):
            raise ValueError(f"must have a string as `{name}`, found {shorten(message[name])}")
    if "content" not in message and role != "assistant":
        raise ValueError("has no `content`")
    _check_content(message.get("content", ""))
    if role != "assistant" and ("tool_calls" in message or "function_call" in message):
        raise ValueError(f"has tool calls, which the role {role} cannot have")
    return _normalize_calls(message)


def _check_content(content: Any) -> None:
    """Raise `ValueError` if the content of a message is neither text nor a list of text parts."""
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ValueError(f"must have text as `content`, found {shorten(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f"contains a part of type {shorten(kind)}; only text is supported")


def _normalize_calls(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its tool calls in one form; raise `ValueError` if a call is wrong."""
    if not isinstance(message.get("tool_calls", []), list):
        raise ValueError(f"must have a list as `tool_calls`, found {shorten(message)}")
    try:
        normalized = normalize_tool_calls(message, "")
    except DataError as error:
        raise ValueError(str(error).strip()) from None
    if has_invalid_arguments(normalized):
        raise ValueError("has a tool call whose `arguments` are not a JSON object")
    return normalized


def _parse_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = _function(tool)
    if not isinstance(function.get("description", ""), str | None):
        raise ValueError(f"must have a string as `description`, found {shorten(function)}")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise ValueError(f"must have an object as `parameters`, found {shorten(function)}")
    return tool


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the `function` of a tool; raise `ValueError` if it has none."""
    function = tool.get("function") if tool.get("type", "function") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not (isinstance(name, str) and name):
        raise ValueError(f"is not a function with a `name`, found {shorten(tool)}")
    return function


def roles(messages: Sequence[dict[str, Any]]) -> set[str]:
    """Return the roles of the messages."""
    return {str(message["role"]) for message in messages}
