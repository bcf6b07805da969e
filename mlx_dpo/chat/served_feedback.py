"""Judgements of answers that the server gave, as labelled rows to train on.

The server remembers its latest answers by the `id` of their completion. They are in memory only: a
server that starts again has forgotten them.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from mlx_dpo.adapters.switch import AdapterState
from mlx_dpo.chat.feedback import JsonlFile, Row, has_same_answer, unpaired_row, utc_timestamp
from mlx_dpo.chat.requests import GOOD, RequestError
from mlx_dpo.types import Message

WRITER = "mlx-dpo serve"
MAX_ANSWERS = 1_000
MAX_CHARACTERS = 1 << 26  # of all prompts and answers
ROW_FIELDS = ("tools", "chat_template_kwargs")  # of a request, which training gives to the template


@dataclass(frozen=True)
class ServedAnswer:
    """An answer with the conversation that it answers, and where it is from."""

    prompt: tuple[Message, ...]
    text: str
    state: AdapterState
    sampling: Mapping[str, Any]
    request: Mapping[str, Any] = field(default_factory=dict)  # `ROW_FIELDS`, where given
    is_cut: bool = False  # at the token limit, so its end should not be learned
    calls_tools: bool = False

    @property
    def characters(self) -> int:
        """Length of the prompt and of the answer, roughly as they are kept in memory."""
        return len(self.text) + sum(len(str(turn)) for turn in self.prompt)


class RecentAnswers:
    """The latest answers by id, bounded in number and in characters. Threads may share it."""

    def __init__(
        self, max_answers: int = MAX_ANSWERS, max_characters: int = MAX_CHARACTERS
    ) -> None:
        self._max_answers, self._max_characters = max_answers, max_characters
        self._answers: OrderedDict[str, ServedAnswer] = OrderedDict()
        self._characters = 0
        self._lock = Lock()

    def add(self, id: str, answer: ServedAnswer) -> None:
        """Remember an answer; forget the oldest ones beyond the bounds."""
        with self._lock:
            self._answers[id] = answer
            self._characters += answer.characters
            while len(self._answers) > self._max_answers or self._characters > self._max_characters:
                self._characters -= self._answers.popitem(last=False)[1].characters

    def get(self, id: str) -> ServedAnswer | None:
        """Return an answer; None if it is unknown or forgotten."""
        with self._lock:
            return self._answers.get(id)


@dataclass(frozen=True)
class ServedFeedback:
    """The file of judged answers, and the answers that can be judged."""

    file: JsonlFile
    provenance: Mapping[AdapterState, Row]  # names and digests of the model in each state
    answers: RecentAnswers = field(default_factory=RecentAnswers)
    _lock: Lock = field(default_factory=Lock)

    def write(self, judgement: Mapping[str, Any]) -> dict[str, Any]:
        """Write the judgement in a checked request; return the reply to the client.

        A good or bad answer is one labelled row. An edited answer is two rows: the edited text is
        good, the answer itself is bad. An earlier judgement of the answer is replaced.

        Raises:
            RequestError: the answer is unknown, or it cannot be judged.
            DataError: the file cannot be written.
        """
        id = judgement["id"]
        answer = self.answers.get(id)
        if answer is None:
            raise RequestError(
                "no such answer; the server remembers its latest answers until it stops",
                "id",
                status=404,
            )
        _check_judged(answer, judgement.get("edited"))
        rows = self._rows(answer, judgement)
        with self._lock:
            replaced = self.file.replace_all(rows, lambda other: _is_outdated(other, rows))
        rating = judgement.get("rating", "edited")
        return {"object": "feedback", "id": id, "rating": rating, "replaced": bool(replaced)}

    def _rows(self, answer: ServedAnswer, judgement: Mapping[str, Any]) -> list[Row]:
        common = {"by": WRITER, "judge": "person", "time": utc_timestamp(), "id": judgement["id"]}
        if judgement.get("comment"):
            common["comment"] = judgement["comment"]
        source = {**self.provenance[answer.state], "sampling": dict(answer.sampling)}
        source |= {"cut": True} if answer.is_cut else {}
        edited = judgement.get("edited")
        texts = [(answer.text, judgement.get("rating") == GOOD, source)]
        if edited is not None:
            texts.append((edited, True, {"author": "person"}))
        return [
            unpaired_row(answer.prompt, text, good=good, provenance=common | origin)
            | dict(answer.request)
            for text, good, origin in texts
        ]


def _check_judged(answer: ServedAnswer, edited: str | None) -> None:
    """Raise `RequestError` if nothing could be learned from the judgement of an answer."""
    if answer.calls_tools:
        raise RequestError("the answer calls a tool; only answers in text can be judged", "id")
    if not answer.text.strip():
        raise RequestError("the answer is empty; only answers with text can be judged", "id")
    if edited is not None and edited.strip() == answer.text.strip():
        raise RequestError("`edited` is the same text as the answer; rate it good", "edited")


def _is_outdated(other: Row, rows: list[Row]) -> bool:
    """Return whether a row is an earlier judgement: of the same completion, or the same answer."""
    provenance = other.get("provenance")
    id = provenance.get("id") if isinstance(provenance, dict) else None
    is_same = id is not None and id == rows[0]["provenance"]["id"]
    return is_same or any(has_same_answer(other, row) for row in rows)
