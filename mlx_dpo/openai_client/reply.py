"""Parse the replies of OpenAI-compatible servers, and tell errors that pass from those that stay.

A server may be of any make: whatever it sends is checked before it is used.
"""

from email.utils import parsedate_to_datetime
from time import time
from typing import Any, Literal, NamedTuple

from mlx_dpo.errors import DPOError
from mlx_dpo.generation.decode import ThinkingSplitter
from mlx_dpo.io.bounded import parse_json

MAX_REPLY_BYTES = 8_000_000  # a million tokens are about 5 MB
THINK_START, THINK_END = "<think>", "</think>"
SHOWN_CHARACTERS = 120  # of a server's message in an error
FILTERED = "content_filter"  # OpenAI's name of the reason why an answer ends
QUOTA = "insufficient_quota"  # OpenAI's name of a 429 that does not pass


class Reply(NamedTuple):
    """The answer in a server's reply, with its thinking."""

    text: str
    finish_reason: Literal["stop", "length"]
    is_filtered: bool = False  # a filter of the server withheld the answer, or its end
    is_usable: bool = True  # False stands for replies that were no answer


class TransientError(DPOError):
    """A request failed in a way that may pass; `wait` is the server's Retry-After in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class UnusableReplyError(TransientError):
    """A server sent status 200, but no answer that can be used."""


def parse_reply(data: bytes) -> Reply:
    """Return the answer in the body of a chat completion.

    Raises:
        UnusableReplyError: the body is not a chat completion with a text.
    """
    content = _parse(data)
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices:
        raise UnusableReplyError(_unusable("`choices` is missing or empty", data))
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise UnusableReplyError(_unusable("`message` is not an object", data))
    reason = choice.get("finish_reason")
    is_filtered = reason == FILTERED
    text = _text(message)
    if text is None:
        # Reasoning may take all tokens; then there is no answer, and nothing is wrong with it.
        if not (is_filtered or reason == "length" or _reasoning(message)):
            raise UnusableReplyError(_unusable("`content` is not text", data))
        text = ""
    return Reply(text, "length" if reason == "length" else "stop", is_filtered)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        content = parse_json(data, "reply", UnusableReplyError, limit=MAX_REPLY_BYTES)
    except UnusableReplyError as error:
        raise UnusableReplyError(_unusable(str(error).removeprefix("reply: "), data)) from None
    if not isinstance(content, dict):
        raise UnusableReplyError(_unusable("not a JSON object", data))
    return content


def _text(message: dict[str, Any]) -> str | None:
    """Return the text of a message; None if there is none, or it is not text."""
    content = message.get("content")
    if content is None:
        content = message.get("refusal")  # OpenAI's field for a refusal in structured output
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if texts and len(texts) == len(parts) else None
    if not isinstance(content, str):
        return None
    try:
        content.encode()
    except UnicodeEncodeError:  # half a character, which no file can store
        return None
    return content


def _reasoning(message: dict[str, Any]) -> bool:
    """Return whether a message has thinking in a field of its own."""
    return bool(message.get("reasoning_content") or message.get("reasoning"))


def _unusable(what: str, data: bytes) -> str:
    begin = shorten(data[: 4 * SHOWN_CHARACTERS].decode("utf-8", "replace"))
    return f"the reply is not a chat completion: {what}; it begins {begin!r}"


def shorten(text: str) -> str:
    """Return text of a server as one line of at most `SHOWN_CHARACTERS` characters."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"


def strip_thinking(text: str) -> str:
    """Return an answer without the thinking that the server left in it, between `<think>` marks.

    The thinking may begin in the prompt, so that the text has only the end mark.
    """
    start, end = text.find(THINK_START), text.find(THINK_END)
    within = end >= 0 and (start < 0 or end < start)
    splitter = ThinkingSplitter(THINK_START, THINK_END, within=within)
    parts = [*splitter.feed(text), *splitter.finish()]
    answer = "".join(part.text for part in parts if not part.thinking)
    return answer.strip("\n") if any(part.thinking for part in parts) else answer


class ServerError(NamedTuple):
    """An error that a server sent instead of an answer, in the form of OpenAI's API."""

    message: str
    param: str | None
    code: str | None


def parse_error(data: bytes) -> ServerError:
    """Return the error in a body; its text is the message if it has another form."""
    try:
        content = parse_json(data, "error", DPOError, limit=MAX_REPLY_BYTES)
    except DPOError:
        return ServerError(shorten(data.decode("utf-8", "replace")), None, None)
    error = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(error, dict):
        return ServerError(shorten(str(error)), None, None)
    message = error.get("message", error.get("detail", error))
    texts = [error.get(name) for name in ("param", "code")]
    param, code = (text if isinstance(text, str) else None for text in texts)
    return ServerError(shorten(str(message)), param, code)


def retry_after(value: str | None) -> float | None:
    """Return the seconds in a header Retry-After, which is a number or a date; None if neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def parse_models(data: bytes) -> list[dict[str, Any]]:
    """Return the models in the body of a reply to `/models`, each with its `id`.

    Raises:
        UnusableReplyError: the body is not a list of models.
    """
    rows = _parse(data).get("data")
    if not isinstance(rows, list):
        raise UnusableReplyError(_unusable("`data` is not a list of models", data))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
