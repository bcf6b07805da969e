"""TRL's ways: `prompt`, `chosen`, `rejected` as text or messages, or a prompt that both share."""

from mlx_dpo.errors import DIFFERENT_PROMPTS, BadPairError, DataError
from mlx_dpo.schemas.messages import pair, text_of, turns_of
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema
from mlx_dpo.types import Message

FIELDS = frozenset({"prompt", "chosen", "rejected"})


def _kinds(record: Record) -> tuple[str | None, str | None]:
    """What the prompt looks like, None if there is none, and what both completions look like."""
    kinds = {str: "text", list: "messages", type(None): None}
    prompt, chosen, rejected = (
        kinds.get(type(record.get(name)), "other") for name in ("prompt", "chosen", "rejected")
    )
    return prompt, chosen if chosen == rejected else "other"


def _messages(record: Record) -> bool:
    kinds = _kinds(record)
    return "messages" in kinds and not {"other", None} & set(kinds)


def _whole_messages(record: Record) -> bool:
    """Whether the completions begin with the prompt."""
    prompt, completions = _kinds(record)
    if completions != "messages" or prompt not in ("text", None):
        return False
    first = record["chosen"][0] if record["chosen"] else None
    return prompt is None or not (isinstance(first, dict) and first.get("role") == "assistant")


def _read_strings(row: Row, rules: RowRules) -> list[PairOrError]:
    prompt, chosen, rejected = (
        text_of(row.record.get(name), name, row.location)
        for name in ("prompt", "chosen", "rejected")
    )
    return pair(row, prompt, chosen, rejected)


def _read_messages(row: Row, rules: RowRules) -> list[PairOrError]:
    turns = turns_of(_as_list(row.record.get("prompt"), "user"), "prompt", row.location)
    return pair(row, turns, _replies(row, "chosen"), _replies(row, "rejected"))


def _replies(row: Row, name: str) -> tuple[Message, ...]:
    turns = turns_of(_as_list(row.record.get(name), "assistant"), name, row.location)
    for turn in turns:
        if turn["role"] != "assistant":
            raise DataError(
                f"{row.location}: `{name}` holds a turn of `{turn['role']}`; beside a `prompt` "
                "it may hold only the assistant's turns"
            )
    return turns


def _as_list(value: object, role: str) -> object:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _read_whole_messages(row: Row, rules: RowRules) -> list[PairOrError]:
    chosen, rejected = (
        turns_of(row.record.get(name), name, row.location) for name in ("chosen", "rejected")
    )
    if chosen[0]["role"] == "assistant":
        raise DataError(
            f"{row.location}: missing `prompt` (`chosen` begins with the assistant's turn); "
            "add it, or begin both conversations with it"
        )
    end = _end_of_shared(chosen, rejected)
    completions = chosen[end:], rejected[end:]
    if any(turn["role"] != "assistant" for turns in completions for turn in turns):
        return [BadPairError(row.location, DIFFERENT_PROMPTS)]
    asked = row.record.get("prompt")
    if isinstance(asked, str) and not any(turn["content"] == asked for turn in chosen[:end]):
        raise DataError(
            f"{row.location}: `chosen` has a prompt of its own that differs from `prompt`; drop one"
        )
    return pair(row, chosen[:end], *completions)


def _end_of_shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while end and chosen[end - 1]["role"] == "assistant":
        end -= 1
    return end


def _read_whole_strings(row: Row, rules: RowRules) -> list[PairOrError]:
    chosen, rejected = (
        text_of(row.record.get(name), name, row.location) for name in ("chosen", "rejected")
    )
    end = _end_of_shared_words(chosen, rejected)
    return pair(row, chosen[:end], chosen[end:], rejected[end:], whole=True)


def _end_of_shared_words(first: str, second: str) -> int:
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
    "strings", lambda record: _kinds(record) == ("text", "text"), _read_strings, FIELDS
)
WHOLE_MESSAGES = Schema("whole-messages", _whole_messages, _read_whole_messages, FIELDS)
MESSAGES = Schema("messages", _messages, _read_messages, FIELDS)
WHOLE_STRINGS = Schema(
    "whole-strings", lambda record: _kinds(record) == (None, "text"), _read_whole_strings, FIELDS
)
