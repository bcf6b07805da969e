"""The one owner of what a message may be: checked, and brought into the form templates read."""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

from mlx_dpo.errors import EMPTY_COMPLETION, NOT_TEXT, SAME_TEXT, BadPairError, DataError
from mlx_dpo.schemas.schema import PairOrError, Row
from mlx_dpo.types import Message, PreferenceExample, Text, UnpairedExample

MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # fields of a row
TEMPLATE_FIELDS = frozenset({"tools", "chat_template_kwargs", *MEDIA})
OURS = frozenset({  # what this program itself tells a template
    "conversation", "messages", "tools", "add_generation_prompt", "continue_final_message",
    "tokenize", "return_dict", "return_tensors", "chat_template", "padding", "truncation",
    "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens",
})  # fmt: skip
DEEPEST = 64  # objects and lists inside each other


def pair(
    row: Row, prompt: Text, chosen: Text, rejected: Text, *, whole: bool = False
) -> list[PairOrError]:
    """The pair of a row, or why there is nothing to learn from it.

    Text beside messages becomes a turn: the prompt the user's, a completion the assistant's.
    """
    if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        prompt = as_turns(prompt, "user")
        chosen, rejected = (as_turns(text, "assistant") for text in (chosen, rejected))
    for completion in (chosen, rejected):
        if not said(completion):
            return [BadPairError(row.location, EMPTY_COMPLETION)]
    if chosen == rejected:
        return [BadPairError(row.location, SAME_TEXT)]
    return [PreferenceExample(prompt, chosen, rejected, row.location, implicit_prompt=whole)]


def prompt_digest(example: PreferenceExample | UnpairedExample) -> str:
    """Return a digest of the prompt and of the other inputs of the chat template.

    Examples with the same digest have the same prompt.
    """
    parts = [example.prompt, example.template_kwargs] if example.template_kwargs else example.prompt
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def as_turns(text: Text, role: str) -> tuple[Message, ...]:
    """Text as a turn of `role`; turns as they are."""
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def said(completion: Text) -> bool:
    """Whether a completion says or calls anything."""
    if isinstance(completion, str):
        return bool(completion.strip())
    return any(turn["content"].strip() or turn.get("tool_calls") for turn in completion)


def kind_of(value: Any, name: str, location: str) -> str:
    """`text` or `messages`; DataError if the field is neither."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value:
        return "messages"
    found = "an empty list" if value == [] else type(value).__name__
    raise DataError(f"{location}: `{name}` must be text or a list of messages, found {found}")


def text_of(value: Any, name: str, location: str) -> str:
    """The field as text.

    Raises:
        DataError: it is something else, or holds half a character.
    """
    if not isinstance(value, str):
        raise DataError(f"{location}: `{name}` must be text, found {type(value).__name__}")
    refuse_unreadable(value, name, location)
    return value


def turns_of(value: Any, name: str, location: str) -> tuple[Message, ...]:
    """The field as messages: `role` and `content` as text, and what else they hold.

    Content in parts of text is joined. A field that is null is as if it were absent.

    Raises:
        DataError: it is no list of messages.
        BadPairError: a part is an image, or anything else but text.
    """
    if kind_of(value, name, location) == "text":
        raise DataError(f"{location}: `{name}` must be a list of messages, found text")
    return tuple(message_of(one, f"{name}[{i}]", location) for i, one in enumerate(value))


def message_of(value: Any, name: str, location: str) -> Message:
    """One message; see `turns_of`."""
    fields = value if isinstance(value, dict) else {}
    message = {key: item for key, item in fields.items() if item is not None}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{location}: `{name}` needs a `role` that is text")
    if calls := message.pop("tool_calls", None):  # an empty list says no more than none
        message["tool_calls"] = _calls(calls, name, location)
        message.setdefault("content", "")
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], name, location)
    if not isinstance(message.get("content"), str):
        raise DataError(f"{location}: `{name}` needs a `content` that is text")
    refuse_unreadable(message, name, location)
    return message


def template_input(record: Mapping[str, Any], tools: Any, location: str) -> dict[str, Any]:
    """What else the chat template is to read: `tools`, and the row's `chat_template_kwargs`.

    Raises:
        DataError: they are no list of objects, and no object.
    """
    if isinstance(tools, str):
        tools = parsed(tools, "tools", location) if tools.strip() else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{location}: `tools` must be a list of objects, or JSON text of one")
    given = record.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise DataError(f"{location}: `chat_template_kwargs` must be an object")
    if taken := sorted(OURS & given.keys()):
        raise DataError(f"{location}: `chat_template_kwargs` cannot say {', '.join(taken)}")
    found = {name: value for name, value in given.items() if value is not None}
    refuse_unreadable([tools, found], "tools", location)
    return found | ({"tools": tools} if tools else {})


def refuse_media(row: Row) -> None:
    """BadPairError for a row that shows or plays something."""
    for name in MEDIA:
        if row.record.get(name):
            raise BadPairError(row.location, NOT_TEXT, f"`{name}`")


def refuse_unreadable(value: Any, name: str, location: str) -> None:
    """DataError for text that no tokenizer takes, and for nests that no template ends."""
    for text, depth in _texts(value):
        if depth > DEEPEST:
            raise DataError(f"{location}: `{name}` is nested too deeply (over {DEEPEST} levels)")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
            half = f"\\u{ord(text[error.start]):04x}"
            raise DataError(
                f"{location}: `{name}` holds half a character ({half} at {error.start}); "
                "mend the text"
            ) from None


def parsed(text: str, name: str, location: str) -> Any:
    """JSON inside a field that is text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: `{name}` is not JSON ({error})") from None


def _texts(value: Any) -> Iterator[tuple[str, int]]:
    """Every text in a value, and how deep it lies; the deepest place at least as an empty one."""
    left = [(value, 0)]
    while left:
        one, depth = left.pop()
        if isinstance(one, str) or depth > DEEPEST:
            yield one if isinstance(one, str) else "", depth
        elif isinstance(one, Mapping):
            left += [(item, depth + 1) for pair in one.items() for item in pair]
        elif isinstance(one, list | tuple):
            left += [(item, depth + 1) for item in one]


def _joined(parts: list[Any], name: str, location: str) -> str:
    texts = []
    for part in parts:
        fields = part if isinstance(part, dict) else {"type": "text", "text": part}
        kind = fields.get("type", "text")
        if kind != "text":
            raise BadPairError(location, NOT_TEXT, f"`{name}` has a part of type {kind!r}")
        if not isinstance(fields.get("text"), str):
            raise DataError(f"{location}: `{name}` has a part of content without text")
        texts.append(fields["text"])
    return "".join(texts)


def _calls(calls: Any, name: str, location: str) -> list[Any]:
    fit = isinstance(calls, list) and all(
        isinstance(call, dict)
        and isinstance(function := call.get("function", call), dict)
        and isinstance(function.get("name"), str)
        for call in calls
    )
    if not fit:
        raise DataError(
            f"{location}: `{name}` has `tool_calls` that are no list of objects with a `name`"
        )
    return list(calls)
