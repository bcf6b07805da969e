"""Parse, check and normalize the texts and messages of a row, and make pairs of them."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

from mlx_dpo.errors import EMPTY_COMPLETION, NOT_TEXT, SAME_TEXT, BadPairError, DataError
from mlx_dpo.schemas.schema import PairOrError, Row, format_names
from mlx_dpo.schemas.tool_calls import normalize_tool_calls
from mlx_dpo.types import Message, PreferenceExample, Text, UnpairedExample

MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")  # of a row
TEMPLATE_FIELDS = frozenset({"tools", "chat_template_kwargs", *MEDIA_FIELDS})
RESERVED_TEMPLATE_KWARGS = frozenset({  # arguments that this program passes to the template itself
    "conversation", "messages", "tools", "add_generation_prompt", "continue_final_message",
    "tokenize", "return_dict", "return_tensors", "chat_template", "padding", "truncation",
    "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens",
})  # fmt: skip
MAX_TEXT = 8_000_000  # characters, over a million tokens; tokenizers abort on far longer words
MAX_DEPTH = 64  # of nested objects and lists
ROLE_KEYS = frozenset({"role", "from"})  # every message has one of these keys
CONTENT_KEYS = frozenset({"content", "value", "tool_calls"})
# How a text begins that holds messages, as JSON or as Python writes a list of dictionaries.
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(['"])(?:role|content|from|value)\1\s*:""")
TEXT_KINDS = (None, "text", "input_text", "output_text")  # of a part of content
TEXT_KEYS = ("text", "value", "content")  # of a part of content; the first is the usual one
PART_MEDIA = frozenset({"image", "image_url", "audio", "input_audio", "video", "file"})
MAX_LITERAL = 1_000_000  # characters of a Python literal, which takes far more memory than JSON


def make_pair(
    row: Row, prompt: Text, chosen: Text, rejected: Text, *, implicit_prompt: bool = False
) -> list[PairOrError]:
    """Return a list of one pair, or of one `BadPairError` if the pair cannot be trained on.

    If any of the three parts is messages, parts that are text become messages too: the prompt a
    user message, a completion an assistant message.
    """
    if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        prompt = to_messages(prompt, "user")
        chosen, rejected = (to_messages(text, "assistant") for text in (chosen, rejected))
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        check_no_messages_in_text(text, name, row.location)
    for completion in (chosen, rejected):
        if not has_content(completion):
            return [BadPairError(row.location, EMPTY_COMPLETION)]
    if chosen == rejected:
        return [BadPairError(row.location, SAME_TEXT)]
    return [
        PreferenceExample(prompt, chosen, rejected, row.location, implicit_prompt=implicit_prompt)
    ]


def prompt_digest(example: PreferenceExample | UnpairedExample) -> str:
    """Return a SHA-256 digest (hex) of the prompt and of the row's chat template arguments.

    Examples with the same digest have the same prompt.
    """
    parts = [example.prompt, example.template_kwargs] if example.template_kwargs else example.prompt
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def to_messages(text: Text, role: str) -> tuple[Message, ...]:
    """Return a text as one message of `role`; messages stay as they are."""
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def has_content(completion: Text) -> bool:
    """Return True if the completion has text or a tool call."""
    if isinstance(completion, str):
        return bool(completion.strip())
    return any(turn["content"].strip() or turn.get("tool_calls") for turn in completion)


def get_field_type(value: Any, name: str, location: str) -> str:
    """Return the type of a field, `text` or `messages`; raise `DataError` for other types."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value:
        return "messages"
    kind = "an empty list" if value == [] else type(value).__name__
    raise DataError(f"{location}: `{name}` must be text or a list of messages, found {kind}")


def parse_text(value: Any, name: str, location: str) -> str:
    """Return the field's value after checking that it is text that UTF-8 can encode.

    Raises:
        DataError: the field is something else, or it has an unpaired surrogate.
    """
    if not isinstance(value, str):
        raise DataError(f"{location}: `{name}` must be text, found {type(value).__name__}")
    check_readable(value, name, location)
    return value


def parse_messages(value: Any, name: str, location: str) -> tuple[Message, ...]:
    """Parse a field into messages: `role` and `content` as text, and any further fields.

    Content parts of type text are joined. Fields that are null are removed.

    Raises:
        DataError: the field is not a list of messages.
        BadPairError: a content part is no text, such as an image.
    """
    if get_field_type(value, name, location) == "text":
        raise DataError(f"{location}: `{name}` must be a list of messages, found text")
    return tuple(parse_message(item, f"{name}[{i}]", location) for i, item in enumerate(value))


def parse_message(value: Any, name: str, location: str) -> Message:
    """Parse one message; see `parse_messages` for the format and the errors."""
    fields = value if isinstance(value, dict) else {}
    message = {key: item for key, item in fields.items() if item is not None}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{location}: `{name}` needs a text `role`")
    message = normalize_tool_calls(message, f"{location}: `{name}`")
    if "tool_calls" in message:
        message.setdefault("content", "")
    if isinstance(message.get("content"), dict):  # a single part
        message["content"] = [message["content"]]
    if isinstance(message.get("content"), list):
        message["content"] = join_text_parts(message["content"], name, location)
    if not isinstance(message.get("content"), str):
        raise DataError(f"{location}: `{name}` needs a text `content`")
    check_readable(message, name, location)
    return message


def read_messages_in_text(text: str) -> Any:
    """Return the messages that a text holds as JSON or as a Python literal; None for other text.

    CSV files and many Parquet files have messages so. The result is a list of objects with a role
    and a content, or one such object.
    """
    start = text.lstrip()[:1]
    if start not in ("[", "{", '"') or not ("role" in text or "from" in text):
        return None
    value = _read_literal(text)
    if isinstance(value, str) and start == '"':  # encoded twice
        value = _read_literal(value) if value.lstrip()[:1] in ("[", "{") else None
    items = value if isinstance(value, list) else [value]
    return value if items and all(map(_is_message, items)) else None


def _read_literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip()) if len(text) <= MAX_LITERAL else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # as its documentation lists
        return None


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and any(isinstance(value.get(key), str) for key in ROLE_KEYS)
        and not CONTENT_KEYS.isdisjoint(value)
    )


def check_no_messages_in_text(text: Text, name: str, location: str) -> None:
    """Raise `DataError` if a text begins as messages do; readable ones were read before."""
    if isinstance(text, str) and MESSAGES_AS_TEXT.match(text):
        raise DataError(
            f"{location}: `{name}` is text that begins like messages, but is neither JSON nor "
            f"Python ({text.strip()[:40]!r}); write a list of messages"
        )


def parse_template_kwargs(record: Mapping[str, Any], tools: Any, location: str) -> dict[str, Any]:
    """Return the row's chat template arguments: `tools` and those in `chat_template_kwargs`.

    Raises:
        DataError: `tools` is not a list of objects, `chat_template_kwargs` is not an object, or it
            has an argument that this program sets itself.
    """
    if isinstance(tools, str):
        tools = parse_json_field(tools, "tools", location) if tools.strip() else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{location}: `tools` must be a list of objects, or JSON text of one")
    kwargs = record.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise DataError(f"{location}: `chat_template_kwargs` must be an object")
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
        raise DataError(f"{location}: `chat_template_kwargs` cannot set {', '.join(reserved)}")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    check_readable([tools, kwargs], "tools", location)
    return kwargs | ({"tools": tools} if tools else {})


def check_no_media(row: Row) -> None:
    """Raise `BadPairError` if the row has images, audio or video."""
    for name in MEDIA_FIELDS:
        if row.record.get(name):
            raise BadPairError(row.location, NOT_TEXT, f"`{name}`")


def check_readable(value: Any, name: str, location: str) -> None:
    """Raise `DataError` if UTF-8 cannot encode a text, or if the value is nested too deeply."""
    for text, depth in _iterate_texts(value):
        if depth > MAX_DEPTH:
            raise DataError(f"{location}: `{name}` is nested too deeply (over {MAX_DEPTH} levels)")
        if len(text) > MAX_TEXT:
            raise DataError(
                f"{location}: `{name}` has a text of {len(text):,} characters (at most "
                f"{MAX_TEXT:,}); shorten it, or leave the row out"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
            half = f"\\u{ord(text[error.start]):04x}"
            raise DataError(
                f"{location}: `{name}` contains an unpaired surrogate ({half} at {error.start}); "
                "fix the text"
            ) from None


def parse_json_field(text: str, name: str, location: str) -> Any:
    """Return the value of a text field that contains JSON; raise `DataError` for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: `{name}` is not JSON ({error})") from None


def _iterate_texts(value: Any) -> Iterator[tuple[str, int]]:
    """Yield (text, depth) for every text in a nested value.

    Lists and objects deeper than `MAX_DEPTH` are not searched; each yields an empty text.
    """
    stack = [(value, 0)]
    while stack:
        node, depth = stack.pop()
        if isinstance(node, str) or depth > MAX_DEPTH:
            yield node if isinstance(node, str) else "", depth
        elif isinstance(node, Mapping):
            stack += [(item, depth + 1) for pair in node.items() for item in pair]
        elif isinstance(node, list | tuple):
            stack += [(item, depth + 1) for item in node]


def join_text_parts(parts: list[Any], name: str, location: str) -> str:
    """Return the text of a content that is a list of parts.

    A part is text, or an object with its text in one of `TEXT_KEYS`, such as
    `{"type": "text", "text": "Hi"}`, `{"type": "text", "value": "Hi"}` or `{"text": "Hi"}`.

    Raises:
        BadPairError: a part is no text, such as an image or a call of a tool.
        DataError: a part has no text, or two different ones.
    """
    return "".join(_part_text(part, name, location) for part in parts)


def _part_text(part: Any, name: str, location: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise DataError(f"{location}: `{name}` has a part of content without text")
    kind = part.get("type")
    other = [key for key in part if key in PART_MEDIA and part[key] is not None]
    if kind not in TEXT_KINDS or other:
        found = repr(kind) if kind not in TEXT_KINDS else f"`{other[0]}`"
        raise BadPairError(location, NOT_TEXT, f"`{name}` has a part of type {found}")
    values = [part[key] for key in TEXT_KEYS if part.get(key) is not None]
    if values and isinstance(values[0], dict):  # {"text": {"value": "Hi"}}, OpenAI's assistants
        values = [values[0].get("value")]
    if not values or any(value != values[0] for value in values) or not isinstance(values[0], str):
        raise DataError(
            f"{location}: `{name}` has a part of content without text (found "
            f"{format_names(part)}; looked for {', '.join(TEXT_KEYS)})"
        )
    return values[0]
