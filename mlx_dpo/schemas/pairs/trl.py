"""Schemas of TRL (text or messages, with explicit or implicit prompt) and of OpenAI (messages)."""

from contextlib import suppress
from typing import Any

from mlx_dpo.errors import DIFFERENT_PROMPTS, BadPairError, DataError
from mlx_dpo.schemas.messages import make_pair, parse_json_field, parse_messages, parse_text
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema
from mlx_dpo.types import Message

FIELDS = frozenset({"prompt", "chosen", "rejected"})


def _field_types(record: Record) -> tuple[str | None, str | None]:
    """Return the types of the prompt and of both completions: `text`, `messages` or `other`.

    The type is None if the field is absent, and `other` if the completions differ in type.
    """
    types = {str: "text", list: "messages", type(None): None}
    prompt, chosen, rejected = (
        types.get(type(record.get(name)), "other") for name in ("prompt", "chosen", "rejected")
    )
    return prompt, chosen if chosen == rejected else "other"


def _is_messages(record: Record) -> bool:
    types = _field_types(record)
    return "messages" in types and not {"other", None} & set(types)


def _is_whole_messages(record: Record) -> bool:
    """Return True if the completions are conversations that begin with the prompt."""
    prompt, completions = _field_types(record)
    if completions != "messages" or prompt not in ("text", None):
        return False
    first = record["chosen"][0] if record["chosen"] else None
    return prompt is None or not (isinstance(first, dict) and first.get("role") == "assistant")


def _parse_strings(row: Row, rules: RowRules) -> list[PairOrError]:
    prompt, chosen, rejected = (
        parse_text(row.record.get(name), name, row.location)
        for name in ("prompt", "chosen", "rejected")
    )
    return make_pair(row, prompt, chosen, rejected)


def _parse_message_pair(row: Row, rules: RowRules) -> list[PairOrError]:
    turns = parse_messages(_wrap_text(row.record.get("prompt"), "user"), "prompt", row.location)
    return make_pair(row, turns, _parse_replies(row, "chosen"), _parse_replies(row, "rejected"))


def _parse_replies(row: Row, name: str) -> tuple[Message, ...]:
    turns = parse_messages(_wrap_text(row.record.get(name), "assistant"), name, row.location)
    for turn in turns:
        if turn["role"] != "assistant":
            raise DataError(
                f"{row.location}: `{name}` has a turn of `{turn['role']}`; with a `prompt` "
                "it may contain only the assistant's turns"
            )
    return turns


def _wrap_text(value: object, role: str) -> object:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _parse_whole_messages(row: Row, rules: RowRules) -> list[PairOrError]:
    chosen, rejected = (
        parse_messages(row.record.get(name), name, row.location) for name in ("chosen", "rejected")
    )
    if chosen[0]["role"] == "assistant":
        raise DataError(
            f"{row.location}: missing `prompt` (`chosen` begins with the assistant's turn); "
            "add it, or begin both conversations with it"
        )
    end = shared_message_count(chosen, rejected)
    completions = chosen[end:], rejected[end:]
    if any(turn["role"] != "assistant" for turns in completions for turn in turns):
        return [BadPairError(row.location, DIFFERENT_PROMPTS)]
    prompt = row.record.get("prompt")
    if isinstance(prompt, str) and not any(turn["content"] == prompt for turn in chosen[:end]):
        raise DataError(
            f"{row.location}: `chosen` begins with a prompt that differs from `prompt`; remove "
            "one of them"
        )
    return make_pair(row, chosen[:end], *completions)


def shared_message_count(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """Return the number of messages in the common prefix, up to its last non-assistant turn."""
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while end and chosen[end - 1]["role"] == "assistant":
        end -= 1
    return end


def _parse_whole_strings(row: Row, rules: RowRules) -> list[PairOrError]:
    chosen, rejected = (
        parse_text(row.record.get(name), name, row.location) for name in ("chosen", "rejected")
    )
    end = _shared_prefix_end(chosen, rejected)
    return make_pair(row, chosen[:end], chosen[end:], rejected[end:], implicit_prompt=True)


def _shared_prefix_end(first: str, second: str) -> int:
    """Return the number of characters in the common prefix of two texts.

    The prefix ends at a word boundary.
    """
    shorter = min(len(first), len(second))
    end = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    inside_a_word = any(
        not text[end : end + 1].isspace() and text[end:] for text in (first, second)
    )
    while inside_a_word and end and not first[end - 1].isspace():
        end -= 1
    # The space goes with the completion: tokenizers write it at the start of the next word.
    return end - 1 if first[end - 1 : end] == " " else end


STRINGS = Schema(
    "strings", lambda record: _field_types(record) == ("text", "text"), _parse_strings, FIELDS
)
WHOLE_MESSAGES = Schema("whole-messages", _is_whole_messages, _parse_whole_messages, FIELDS)
MESSAGES = Schema("messages", _is_messages, _parse_message_pair, FIELDS)
WHOLE_STRINGS = Schema(
    "whole-strings",
    lambda record: _field_types(record) == (None, "text"),
    _parse_whole_strings,
    FIELDS,
)


OPENAI_FIELDS = frozenset({"input", "preferred_output", "non_preferred_output"})


def _get_input(record: Record) -> dict[str, Any]:
    input_ = record.get("input")
    if isinstance(input_, str) and input_.lstrip().startswith("{"):  # as in CSV
        with suppress(DataError):
            input_ = parse_json_field(input_, "input", "")
    return input_ if isinstance(input_, dict) else {}


def _parse_openai(row: Row, rules: RowRules) -> list[PairOrError]:
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
                f"{row.location}: an output has a turn of `{turn['role']}`; it may contain only "
                "the assistant's turns"
            )
    return make_pair(row, prompt, chosen, rejected)


OPENAI = Schema(
    "openai",
    lambda record: "preferred_output" in record,
    _parse_openai,
    OPENAI_FIELDS,
    tools=lambda record: _get_input(record).get("tools"),
)
