"""Rows -> preferences: one function for each way in which files write a pair. Text only."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mlx_dpo.errors import DataError
from mlx_dpo.preferences.faults import DIVERGED, EMPTY, SAME_TEXT, BadPair
from mlx_dpo.preferences.sources import Row
from mlx_dpo.types import Message, Preference, Text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # Anthropic's turn marks
FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Schema:
    """One way of writing a pair."""

    name: str
    read: Callable[[Row], tuple[Text, Text, Text]]  # prompt, chosen, rejected
    is_dialogue: bool = False  # text whose turns are marked within: no single user turn


def to_preference(row: Row, schema: Schema | None = None) -> Preference:
    """The row as prompt, chosen and rejected: three strings, or three tuples of turns.

    `schema` is `schema_of(row)` where a caller has asked for it already.

    Raises:
        DataError: a field is missing or of another kind, or the row is no pair at all.
        BadPair: the row is a pair, but teaches nothing.
    """
    prompt, chosen, rejected = (schema or schema_of(row)).read(row)
    for completion in (chosen, rejected):
        if not _said(completion).strip():
            raise BadPair(row.where, EMPTY)
    if chosen == rejected:
        raise BadPair(row.where, SAME_TEXT)
    return Preference(prompt, chosen, rejected, row.where)


def schema_of(row: Row) -> Schema:
    """How the row writes its pair.

    Raises:
        DataError: in no way that is read here; says which one it looks like.
    """
    record = row.record
    for looks_like, what in FOREIGN:
        if looks_like(record):
            raise DataError(f"{row.where}: {what}")
    for name in ("chosen", "rejected"):
        if name not in record:
            found = ", ".join(f"`{key}`" for key in sorted(record)) or "nothing"
            raise DataError(f"{row.where}: missing `{name}` (found {found})")
    for name in UNREAD:
        if record.get(name):
            raise DataError(
                f"{row.where}: `{name}` is not read, and the pair means less without it"
            )
    _refuse_misspelt_prompt(row)
    kinds = {_kind(record[name], name, row.where) for name in FIELDS[1:]}
    if len(kinds) > 1:
        raise DataError(f"{row.where}: one of `chosen` and `rejected` is text, the other messages")
    prompt = record.get("prompt")
    written = None if prompt is None else _kind(prompt, "prompt", row.where)
    return SCHEMAS[written, kinds.pop()]


def _refuse_misspelt_prompt(row: Row) -> None:
    """A row without a prompt may be whole dialogues; one with a `promt` is a slip."""
    near = get_close_matches("prompt", row.record, n=1, cutoff=0.75)
    if "prompt" not in row.record and near:
        raise DataError(f"{row.where}: missing `prompt` (found `{near[0]}`)")


def _kind(value: Any, name: str, where: str) -> str:
    if isinstance(value, str):
        _refuse_half_characters(value, name, where)
        return "text"
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"{where}: `{name}` must be text or a list of messages, found {found}")
    for number, message in enumerate(value):
        fields = message if isinstance(message, dict) else {}
        for field in ("role", "content"):
            if not isinstance(fields.get(field), str):
                raise DataError(f"{where}: `{name}[{number}]` needs a `{field}` that is text")
        _refuse_half_characters(fields["content"], f"{name}[{number}]", where)
    return "messages"


def _refuse_half_characters(text: str, name: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{where}: `{name}` holds half a character ({half} at {error.start}); mend the text"
        ) from None


def _explicit_text(row: Row) -> tuple[Text, Text, Text]:
    prompt, chosen, rejected = (row.record[name] for name in FIELDS)
    return prompt, chosen, rejected


def _dialogue_text(row: Row) -> tuple[Text, Text, Text]:
    chosen, rejected = row.record["chosen"], row.record["rejected"]
    if all(HUMAN in text and ASSISTANT in text for text in (chosen, rejected)):
        end, other = (text.rindex(ASSISTANT) + len(ASSISTANT) for text in (chosen, rejected))
        if chosen[:end] != rejected[:other]:
            raise BadPair(row.where, DIVERGED)
    else:
        end = _end_of_shared_words(chosen, rejected)
    return chosen[:end], chosen[end:], rejected[end:]


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


def _explicit_messages(row: Row) -> tuple[Text, Text, Text]:
    prompt = row.record["prompt"]
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
    if turns[-1]["role"] == "assistant":
        raise DataError(
            f"{row.where}: `prompt` ends with the assistant's turn; "
            "it must end with what the completions answer"
        )
    return turns, _replies(row, "chosen"), _replies(row, "rejected")


def _text_before_messages(row: Row) -> tuple[Text, Text, Text]:
    if row.record["chosen"][0]["role"] == "assistant":
        return _explicit_messages(row)
    prompt, chosen, rejected = _shared_messages(row)
    if not any(turn["content"] == row.record["prompt"] for turn in prompt):
        raise DataError(
            f"{row.where}: `chosen` has a prompt of its own that differs from `prompt`; drop one"
        )
    return prompt, chosen, rejected


def _shared_messages(row: Row) -> tuple[tuple[Message, ...], Text, Text]:
    chosen, rejected = tuple(row.record["chosen"]), tuple(row.record["rejected"])
    if chosen[0]["role"] == "assistant":
        raise DataError(
            f"{row.where}: missing `prompt` (`chosen` begins with the assistant's turn); "
            "add it, or begin both conversations with it"
        )
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while end and chosen[end - 1]["role"] == "assistant":
        end -= 1
    replies = chosen[end:], rejected[end:]
    if any(turn["role"] != "assistant" for reply in replies for turn in reply):
        raise BadPair(row.where, DIVERGED)
    return chosen[:end], *replies


def _replies(row: Row, name: str) -> tuple[Message, ...]:
    value = row.record[name]
    if isinstance(value, str):
        return ({"role": "assistant", "content": value},)
    for turn in value:
        if turn["role"] != "assistant":
            raise DataError(
                f"{row.where}: `{name}` holds a turn of `{turn['role']}`; beside a `prompt` "
                "it may hold only the assistant's turns"
            )
    return tuple(value)


def _said(completion: Text) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(turn["content"] for turn in completion)


_MESSAGES = Schema("messages", _explicit_messages)
SCHEMAS: dict[tuple[str | None, str], Schema] = {  # by what `prompt` and the completions are
    ("text", "text"): Schema("prompt and completions as text", _explicit_text),
    (None, "text"): Schema("whole dialogues as text", _dialogue_text, is_dialogue=True),
    ("messages", "messages"): _MESSAGES,
    ("messages", "text"): _MESSAGES,
    ("text", "messages"): Schema("messages", _text_before_messages),
    (None, "messages"): Schema("whole conversations as messages", _shared_messages),
}
UNREAD = ("tools", "images", "chat_template_kwargs")
FOREIGN: tuple[tuple[Callable[[dict[str, Any]], bool], str], ...] = (
    (
        lambda record: "conversations" in record and isinstance(record.get("chosen"), dict),
        "a ShareGPT row (`conversations`), which is not read; write the turns as `prompt`, "
        "`chosen` and `rejected` with `role` and `content`",
    ),
    (
        lambda record: "preferred_output" in record,
        "a row in OpenAI's fine-tuning form (`preferred_output`), which is not read; write it as "
        "`prompt`, `chosen` and `rejected`",
    ),
    (
        lambda record: "label" in record and "chosen" not in record,
        "a single labelled answer, as KTO takes them (`label`), and no pair; DPO needs "
        "`chosen` and `rejected` for the same prompt",
    ),
)
