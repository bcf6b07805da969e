"""Prompt and answers in the fields of an annotated record, and the verdict of several annotators.

The person who sets up the annotation chooses the names of these fields, so they are found by what
templates and guides of the tools call them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import parse_messages, parse_text
from mlx_dpo.schemas.pairs.compared import read_verdict
from mlx_dpo.types import Text

PROMPT_FIELDS = (
    "prompt", "instruction", "question", "query", "input", "messages", "conversation", "chat",
    "context",
)  # fmt: skip
ANSWER_FIELD = re.compile(
    r"(?:answer|response|completion|output|generation|reply|candidate|option|text)"
    r"[-_ ]?(?:\d{1,2}|[a-d])",
    re.IGNORECASE,
)
CHOSEN_REJECTED = ("chosen", "rejected")
VOTES_BY_WORD = {"left": -1, "right": 1}


def find_prompt_field(fields: Mapping[str, Any]) -> str | None:
    """Return the name of the field with the prompt, or None if no field has such a name."""
    return next((name for name in PROMPT_FIELDS if fields.get(name) is not None), None)


def find_answer_fields(fields: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields with answers, in the order of the record.

    These are `chosen` and `rejected`, or names such as `answer1`, `response_b`, `generation-0`.
    """
    if all(fields.get(name) is not None for name in CHOSEN_REJECTED):
        return list(CHOSEN_REJECTED)
    return [
        name for name, value in fields.items() if value is not None and ANSWER_FIELD.fullmatch(name)
    ]


def parse_content(value: Any, name: str, location: str) -> Text:
    """Return the text or the messages of a field.

    Raises:
        DataError: the field is neither text nor a list of messages.
        BadPairError: a message has an image or another medium.
    """
    if isinstance(value, list):
        return parse_messages(value, name, location)
    return parse_text(value, name, location)


def read_vote(text: str, names: tuple[str, str]) -> int | None:
    """Return -1 if a verdict prefers the first of two answers, 1 the second, 0 for a tie.

    The result is None if the text says none of these.

    Args:
        text: `left`, `right`, the name of an answer, a word such as `Response 1`, `A` or `tie`.
        names: names of the two answers.
    """
    if (vote := VOTES_BY_WORD.get(text.strip().lower())) is not None:
        return vote
    short = [simplify(name) for name in names]
    if simplify(text) in short:
        return 2 * short.index(simplify(text)) - 1
    lead = read_verdict(text, names)
    return None if lead is None else int(lead)


def simplify(name: str) -> str:
    """Return the letters and digits of a name in lower case: `Response-1` becomes `response1`."""
    return "".join(c for c in name.lower() if c.isalnum())


def find_majority(votes: Iterable[int]) -> int:
    """Return the vote that most annotators gave; 0, a tie, if several votes are the most frequent.

    Args:
        votes: -1, 0 or 1 of each annotator; at least one.
    """
    (first, count), *others = Counter(votes).most_common(2)
    return 0 if others and others[0][1] == count else first


def require_prompt(fields: Mapping[str, Any], location: str, where: str) -> str:
    """Return the name of the field with the prompt.

    Args:
        fields: the fields of the record.
        location: location of the row, for the error.
        where: the object that has the fields, with a final dot: the flag `--column` needs it.

    Raises:
        DataError: no field has the name of a prompt.
    """
    name = find_prompt_field(fields)
    if name is None:
        raise DataError(
            f"{location}: no field with the prompt (looked for {', '.join(PROMPT_FIELDS)}, found "
            f"{', '.join(sorted(fields)) or 'nothing'}); name it: --column prompt={where}NAME"
        )
    return name
