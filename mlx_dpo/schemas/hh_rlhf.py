"""Whole dialogues as text with Anthropic's turn marks, which both answers share up to the last."""

from mlx_dpo.errors import DIFFERENT_PROMPTS, BadPairError
from mlx_dpo.schemas.messages import pair, text_of
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema
from mlx_dpo.types import Message, PreferenceExample, Text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {HUMAN: "user", ASSISTANT: "assistant"}


def turns(prompt: Text) -> tuple[Message, ...] | None:
    """The turns before an answer; None where the text is not marked from beginning to end.

    White space around a turn is not part of it.
    """
    if not (isinstance(prompt, str) and prompt.lstrip().startswith(HUMAN.strip())):
        return None
    text = "\n\n" + prompt.strip()
    if not text.endswith(ASSISTANT):
        return None
    found: list[Message] = []
    for piece in text[: -len(ASSISTANT)].replace(ASSISTANT, f"{HUMAN}\0").split(HUMAN)[1:]:
        role = "assistant" if piece.startswith("\0") else "user"
        found.append({"role": role, "content": piece.removeprefix("\0").strip()})
    return tuple(found)


def as_messages(preference: PreferenceExample) -> PreferenceExample | None:
    """The same pair as turns; None where the text is not marked."""
    prompt = turns(preference.prompt)
    if prompt is None:
        return None
    chosen, rejected = (
        ({"role": "assistant", "content": str(text).strip()},)
        for text in (preference.chosen, preference.rejected)
    )
    return PreferenceExample(
        prompt, chosen, rejected, preference.location, preference.template_kwargs
    )


def _marked(record: Record) -> bool:
    texts = [record.get(name) for name in ("chosen", "rejected")]
    if record.get("prompt") is not None or not all(isinstance(text, str) for text in texts):
        return False
    return all(HUMAN in f"\n\n{text}" and ASSISTANT in str(text) for text in texts)


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    chosen, rejected = (
        text_of(row.record.get(name), name, row.location) for name in ("chosen", "rejected")
    )
    end, other = (text.rfind(ASSISTANT) + len(ASSISTANT) for text in (chosen, rejected))
    if chosen[:end] != rejected[:other]:
        return [BadPairError(row.location, DIFFERENT_PROMPTS)]
    return pair(row, chosen[:end], chosen[end:], rejected[end:], whole=True)


DIALOGUES = Schema("dialogues", _marked, _parse, frozenset({"chosen", "rejected"}))
