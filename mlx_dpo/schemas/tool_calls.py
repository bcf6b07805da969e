"""Read tool calls in the forms of OpenAI's API, Hugging Face and older data sets.

Training, the checks of data sets and the server read calls by these functions, so the same call
becomes the same text everywhere.
"""

import json
from collections.abc import Mapping
from typing import Any

from mlx_dpo.errors import DataError
from mlx_dpo.types import Message


def normalize_tool_calls(message: Mapping[str, Any], where: str) -> Message:
    """Return the message with its tool calls in one form: `function` with a name and arguments.

    The arguments become an object, from an object or from JSON text of one. Other text stays text,
    as some chat templates write it. OpenAI's old `function_call` becomes a tool call, and the old
    role `function` becomes `tool`.

    Args:
        message: the message; fields that are null are absent.
        where: location and field of the message, for errors.

    Raises:
        DataError: the message has tool calls that are no list of objects with a `name`, or
            arguments that are neither an object nor text.
    """
    normalized = dict(message)
    calls = normalized.pop("tool_calls", None)  # an empty list means no calls
    if (old := normalized.pop("function_call", None)) and not calls:
        calls = [{"type": "function", "function": old}]
    if normalized.get("role") == "function":
        normalized["role"] = "tool"
    if calls:
        if not isinstance(calls, list):
            raise _no_calls(where)
        normalized["tool_calls"] = [_normalize_call(call, where) for call in calls]
    return normalized


def has_invalid_arguments(message: Mapping[str, Any]) -> bool:
    """Return True if a tool call's arguments are text that is not JSON of an object.

    The message must be one that `normalize_tool_calls` returned.
    """
    calls = message.get("tool_calls") or ()
    return any(isinstance(call["function"]["arguments"], str) for call in calls)


def parse_arguments(text: str) -> dict[str, Any] | None:
    """Return the object that the JSON text of a tool call's arguments describes.

    Empty text is a call without arguments. The result is None if the text is not JSON, not an
    object, or if an object in it has a key twice.
    """
    if not text.strip():
        return {}
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_check_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def format_arguments(arguments: Mapping[str, Any]) -> str:
    """Return the arguments of a tool call as JSON text, as mlx-lm's server writes them."""
    return json.dumps(arguments, ensure_ascii=False)


def _normalize_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call with the entries `type` and `function`, and its other entries as given."""
    if not isinstance(call, dict):
        raise _no_calls(where)
    if call.get("function") is not None:
        function, outer = call["function"], call
    else:  # name and arguments without `function` around them
        own = {name: call[name] for name in ("id", "type") if name in call}
        function, outer = {k: v for k, v in call.items() if k not in own}, own
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _no_calls(where)
    others = {k: v for k, v in function.items() if k not in ("name", "arguments")}
    arguments = function.get("arguments")
    if arguments is None:
        arguments = others.pop("parameters", None) or {}
    normalized = {"name": function["name"], "arguments": _read_arguments(arguments, where)}
    return {**outer, "type": "function", "function": normalized | others}


def _read_arguments(arguments: Any, where: str) -> dict[str, Any] | str:
    if isinstance(arguments, str):
        parsed = parse_arguments(arguments)
        return arguments if parsed is None else parsed
    if isinstance(arguments, dict):
        return arguments
    raise DataError(
        f"{where} has a tool call whose `arguments` must be an object or JSON text of one, found "
        f"{type(arguments).__name__}"
    )


def _no_calls(where: str) -> DataError:
    return DataError(f"{where} must have as `tool_calls` a list of objects with a `name`")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def _check_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
