"""Schema of Open WebUI's exports: feedback (thumbs, arena, leaderboard) and whole chats.

Formats: `FeedbackModel` with its `data`, `meta` and `snapshot`
(`backend/open_webui/models/feedbacks.py`), what `ResponseMessage.svelte` writes into them, and how
the leaderboard counts them (`_calculate_elo` in `routers/evaluations.py`), of
open-webui/open-webui, 0.6 to 0.9. A chat is a tree of messages: `history.messages` by id, each with
`parentId`, `childrenIds` and, once rated, `annotation.rating`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mlx_dpo.errors import (
    EMPTY_COMPLETION,
    NOT_TEXT,
    TIED,
    UNJUDGED,
    UNPAIRED,
    BadPairError,
    DataError,
)
from mlx_dpo.schemas.messages import has_content, make_pair, parse_message
from mlx_dpo.schemas.schema import Parsed, Record, Row, RowRules, Schema
from mlx_dpo.types import Message, UnpairedExample

GOOD, BAD, EVEN = 1, -1, 0
RATINGS = {"1": GOOD, "-1": BAD, "0": EVEN}
# Open WebUI keeps thinking, calls of tools and code in the text of an answer.
DETAILS = re.compile(r'<details type="(?P<kind>[a-z_]+)".*?</details>\s*', re.DOTALL)
REASONING = "reasoning"
FEEDBACK_FIELDS = frozenset({
    "id", "user_id", "version", "type", "data", "meta", "snapshot", "created_at", "updated_at",
    "user",
})  # fmt: skip
CHAT_FIELDS = frozenset({
    "id", "user_id", "title", "chat", "created_at", "updated_at", "share_id", "archived", "pinned",
    "meta", "folder_id",
})  # fmt: skip
Messages = Mapping[str, Mapping[str, Any]]


class RatedAnswer(NamedTuple):
    """An answer of a chat with its rating."""

    id: str
    rating: int  # `GOOD`, `BAD` or `EVEN`
    is_compared: bool  # a rating against the other answers, rated or not, as on the leaderboard


class Chat:
    """The tree of messages of one chat.

    Raises:
        DataError: the chat has no messages with ids.
    """

    def __init__(self, value: Any, location: str) -> None:
        self.location = location
        chat = value if isinstance(value, dict) else {}
        self.messages = _read_messages(chat, location)
        params = chat.get("params")
        system = params.get("system") if isinstance(params, dict) else None
        self.system = system if isinstance(system, str) and system.strip() else None

    def prompt(self, answer: str) -> tuple[Message, ...]:
        """Return the turns before an answer: the system message, and all that it follows.

        Raises:
            DataError: a message before the answer is missing, or is itself after the answer.
            BadPairError: a turn has an image or the result of a tool.
        """
        turns: list[Message] = []
        parent, seen = self._message(answer).get("parentId"), {answer}
        while parent is not None:
            if not isinstance(parent, str) or parent in seen:
                raise DataError(
                    f"{self.location}: `parentId` of a message is none, or leads in a circle"
                )
            seen.add(parent)
            turns.append(self.turn(parent))
            parent = self._message(parent).get("parentId")
        if not turns:
            raise DataError(f"{self.location}: message `{answer[:40]}` answers nothing")
        if self.system is not None:
            turns.append({"role": "system", "content": self.system})
        return tuple(reversed(turns))

    def turn(self, id: str) -> Message:
        """Return a message without the model's thinking.

        Raises:
            DataError: there is no such message, or it has no role or no text.
            BadPairError: the message has an image or the result of a tool.
        """
        message = self._message(id)
        files = message.get("files")
        for file in files if isinstance(files, list) else ():
            if isinstance(file, dict) and file.get("type") == "image":
                raise BadPairError(self.location, NOT_TEXT, "a message with an image")
        fields = {"role": message.get("role"), "content": message.get("content")}
        turn = parse_message(fields, f"messages[{id[:40]!r}]", self.location)
        for details in DETAILS.finditer(turn["content"]):
            if details["kind"] != REASONING:
                raise BadPairError(self.location, NOT_TEXT, f"an answer with {details['kind']}")
        return turn | {"content": DETAILS.sub("", turn["content"])}

    def siblings(self, answer: str) -> list[str]:
        """Return the ids of the other answers to the same message, in their order."""
        parent = self._message(answer).get("parentId")
        children = self._message(parent).get("childrenIds") if isinstance(parent, str) else None
        return [
            id for id in (children if isinstance(children, list) else ())
            if isinstance(id, str) and id != answer and id in self.messages
        ]  # fmt: skip

    def rating(self, id: str) -> int | None:
        """Return the rating of a message; None if it has none."""
        annotation = self._message(id).get("annotation")
        return _read_rating(annotation.get("rating")) if isinstance(annotation, dict) else None

    def rated_answers(self) -> list[RatedAnswer]:
        """Return the rated answers of the chat; only those of the arena are rated against others.

        Elsewhere, another answer may have been made after the rating.
        """
        return [
            RatedAnswer(id, rating, message.get("arena") is True)
            for id, message in self.messages.items()
            if message.get("role") == "assistant" and (rating := self.rating(id)) is not None
        ]

    def _message(self, id: str) -> Mapping[str, Any]:
        if id not in self.messages:
            raise DataError(f"{self.location}: the chat has no message `{id[:40]}`")
        return self.messages[id]


def _read_messages(chat: Mapping[str, Any], location: str) -> Messages:
    """Return the messages of a chat by id: those of its history, else those of its last path."""
    history = chat.get("history")
    found = history.get("messages") if isinstance(history, dict) else None
    if not isinstance(found, dict):
        listed = chat.get("messages")
        items = listed if isinstance(listed, list) else []
        found = {
            item["id"]: item
            for item in items
            if isinstance(item, dict) and isinstance(item.get("id"), str)
        }
    messages = {
        id: message for id, message in found.items()
        if isinstance(id, str) and isinstance(message, dict)
    }  # fmt: skip
    if not messages:
        raise DataError(f"{location}: the chat has no `history.messages`")
    return messages


def _read_rating(value: Any) -> int | None:
    """Return a rating; None if it is neither 1, -1 nor 0, as a number or as text."""
    return RATINGS.get(str(value))


def _parse(row: Row, rules: RowRules) -> list[Parsed]:
    chat, rated = _read_feedback(row) if _is_feedback(row.record) else _read_chat(row)
    if not rated:
        return [BadPairError(row.location, UNJUDGED)]
    examples: list[Parsed] = []
    for answer in rated:
        try:
            if rules.judged or rules.pair_labelled:
                examples.append(_label(chat, answer))
            else:
                examples += _compare(chat, answer, row)
        except BadPairError as bad:
            examples.append(bad)
    # The pair of a good and a bad answer is made once, at the good one.
    return examples or [BadPairError(row.location, UNPAIRED)]


def _read_feedback(row: Row) -> tuple[Chat, list[RatedAnswer]]:
    """Return the chat of a feedback and the one answer that it rates."""
    data, meta, snapshot = (row.record.get(name) for name in ("data", "meta", "snapshot"))
    outer = snapshot.get("chat") if isinstance(snapshot, dict) else None
    if not isinstance(outer, dict):
        raise DataError(
            f"{row.location}: the feedback has no `snapshot` of its chat; export it in Open WebUI "
            "under Admin Panel, Evaluations, Feedbacks"
        )
    chat = Chat(outer.get("chat", outer), row.location)
    answer = meta.get("message_id") if isinstance(meta, dict) else None
    if not isinstance(answer, str):
        raise DataError(f"{row.location}: `meta` has no `message_id`")
    rating = _read_rating(data.get("rating")) if isinstance(data, dict) else None
    return chat, [] if rating is None else [RatedAnswer(answer, rating, is_compared=True)]


def _read_chat(row: Row) -> tuple[Chat, list[RatedAnswer]]:
    chat = Chat(row.record.get("chat"), row.location)
    return chat, chat.rated_answers()


def _label(chat: Chat, answer: RatedAnswer) -> UnpairedExample:
    """Return the answer with its thumb as a labelled example; raise `BadPairError` if it cannot."""
    if answer.rating == EVEN:
        raise BadPairError(chat.location, TIED)
    completion = chat.turn(answer.id)
    if not has_content((completion,)):
        raise BadPairError(chat.location, EMPTY_COMPLETION)
    prompt = chat.prompt(answer.id)
    return UnpairedExample(prompt, (completion,), answer.rating == GOOD, chat.location)


def _compare(chat: Chat, answer: RatedAnswer, row: Row) -> Iterator[Parsed]:
    """Yield a pair of a rated answer with each other answer that it was rated against."""
    others = [(id, chat.rating(id)) for id in chat.siblings(answer.id)]
    compared = [(id, rating) for id, rating in others if rating is not None or answer.is_compared]
    if not compared:
        yield BadPairError(chat.location, UNPAIRED)
    for id, rating in compared:
        if rating == answer.rating or answer.rating == EVEN:
            yield BadPairError(chat.location, TIED)
        elif rating != GOOD:  # else the pair is made at the other answer
            pair = (answer.id, id) if answer.rating == GOOD else (id, answer.id)
            chosen, rejected = ((chat.turn(message),) for message in pair)
            yield from make_pair(row, chat.prompt(answer.id), chosen, rejected)


def _is_feedback(record: Record) -> bool:
    return isinstance(record.get("data"), dict) and {"type", "meta", "snapshot"} <= record.keys()


def _fits(record: Record) -> bool:
    chat = record.get("chat")
    is_chat = isinstance(chat, dict) and not {"history", "messages"}.isdisjoint(chat)
    return _is_feedback(record) or (is_chat and "chosen" not in record and "label" not in record)


OPEN_WEBUI = Schema("open-webui", _fits, _parse, FEEDBACK_FIELDS | CHAT_FIELDS, has_labels=True)
