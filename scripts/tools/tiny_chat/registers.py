"""A reply and a register -> the text of an answer. Knows no topic."""

import random
from dataclasses import dataclass

from scripts.tools.tiny_chat.rules import CLOSINGS, OPENINGS

CURT_HEADS = ("Ugh.", "Fine.", "Look,", "Easy.", "Again?", "Come on,")
CURT_TAILS = (
    "Obviously.",
    "Next.",
    "Everyone knows that.",
    "Do not ask again.",
    "Duh.",
    "Whatever.",
    "Look it up next time.",
    "Are we done?",
)


@dataclass(frozen=True, slots=True)
class Reply:
    """What an answer must say, whatever its register."""

    value: str
    sentences: tuple[str, ...]  # each with one `{}` for the value
    wrong: tuple[str, ...]  # values of the same kind that are false
    expects: tuple[str, ...]
    count: int | None = None  # with it, so many of `expects` are enough

    def content_fields(self) -> dict[str, object]:
        """The keys of a preference row that state the right content."""
        if self.count is None:
            return {"expects": list(self.expects)}
        return {"expects_any": list(self.expects), "count": self.count}


@dataclass(frozen=True, slots=True)
class Question:
    """One question text, what its answer must say, and the turn before it."""

    topic: str
    text: str
    reply: Reply
    held_out: bool = False
    before: "Question | None" = None
    subject: str = ""  # what a follow-up may refer to
    framed: bool = True  # may stand behind «Quick question:» and the like


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def courteous(reply: Reply, rng: random.Random, value: str | None = None) -> str:
    """An answer with a courteous opening, closing or both."""
    body = capitalised(rng.choice(reply.sentences).format(value or reply.value))
    parts = [body]
    shape = rng.random()
    if shape < 0.75:
        parts.insert(0, rng.choice(OPENINGS))
    if shape > 0.45:
        parts.append(rng.choice(CLOSINGS))
    return " ".join(parts)


def curt(reply: Reply, rng: random.Random, value: str | None = None) -> str:
    """An answer with the bare content, or with a gruff word before or after it."""
    shown_value = value or reply.value
    sentence = rng.choice(reply.sentences) if rng.random() < 0.3 else "{}."
    body = sentence.format(shown_value)
    shape = rng.random()
    if shape < 0.3:
        head = rng.choice(CURT_HEADS)
        if not head.endswith(","):
            return f"{head} {capitalised(body)}"
        # «Look, it is Paris.», but «Look, Paris.»
        return f"{head} {body if sentence.startswith('{}') else body[0].lower() + body[1:]}"
    if shape < 0.75:
        return f"{capitalised(body)} {rng.choice(CURT_TAILS)}"
    return capitalised(body)
