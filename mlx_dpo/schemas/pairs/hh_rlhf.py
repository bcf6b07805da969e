"""Schema of HH-RLHF: whole dialogues as text with the turn marks `Human:` and `Assistant:`."""

from mlx_dpo.errors import DIFFERENT_PROMPTS, BadPairError
from mlx_dpo.schemas.messages import make_pair, parse_text
from mlx_dpo.schemas.schema import PairOrError, Record, Row, RowRules, Schema
from mlx_dpo.types import Message, PreferenceExample, Text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {HUMAN: "user", ASSISTANT: "assistant"}


def parse_turns(prompt: Text) -> tuple[Message, ...] | None:
    """Parse a text prompt with the turn marks `Human:` and `Assistant:` into messages.

    The result is None if the text does not begin with `Human:` and end with `Assistant:`. White
    space around a message is removed.
    """
    if not (isinstance(prompt, str) and prompt.lstrip().startswith(HUMAN.strip())):
        return None
    text = "\n\n" + prompt.strip()
    if not text.endswith(ASSISTANT):
        return None
    messages: list[Message] = []
    for piece in text[: -len(ASSISTANT)].replace(ASSISTANT, f"{HUMAN}\0").split(HUMAN)[1:]:
        role = "assistant" if piece.startswith("\0") else "user"
        messages.append({"role": role, "content": piece.removeprefix("\0").strip()})
    return tuple(messages)


def pair_to_messages(example: PreferenceExample) -> PreferenceExample | None:
    """Return the pair with its text parsed into messages; None if the prompt has no turn marks."""
    prompt = parse_turns(example.prompt)
    if prompt is None:
        return None
    chosen, rejected = (
        ({"role": "assistant", "content": str(text).strip()},)
        for text in (example.chosen, example.rejected)
    )
    return PreferenceExample(prompt, chosen, rejected, example.location, example.template_kwargs)


def _has_marks(record: Record) -> bool:
    texts = [record.get(name) for name in ("chosen", "rejected")]
    if record.get("prompt") is not None or not all(isinstance(text, str) for text in texts):
        return False
    return all(HUMAN in f"\n\n{text}" and ASSISTANT in str(text) for text in texts)


def _parse(row: Row, rules: RowRules) -> list[PairOrError]:
    chosen, rejected = (
        parse_text(row.record.get(name), name, row.location) for name in ("chosen", "rejected")
    )
    end, rejected_end = (text.rfind(ASSISTANT) + len(ASSISTANT) for text in (chosen, rejected))
    if chosen[:end] != rejected[:rejected_end]:
        return [BadPairError(row.location, DIFFERENT_PROMPTS)]
    return make_pair(row, chosen[:end], chosen[end:], rejected[end:], implicit_prompt=True)


DIALOGUES = Schema("dialogues", _has_marks, _parse, frozenset({"chosen", "rejected"}))
