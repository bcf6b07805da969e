"""Text -> prompt ids and completion ids, with the boundary between them proved.

The chat template is applied here and nowhere else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from mlx_dpo.errors import DataError
from mlx_dpo.preferences.faults import EMPTY_PROMPT, BadPair
from mlx_dpo.types import Message, Preference, Text

Ids = tuple[int, ...]


class Rows(NamedTuple):
    """A pair as ids, before anything is added or cut."""

    prompt: Ids
    completions: list[Ids]  # chosen, rejected
    moved: int  # prompt tokens that merge with a completion and went over to it


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer, mlx-lm's wrapper or one of transformers, has a chat template."""
    has = getattr(tokenizer, "has_chat_template", None)
    return has if has is not None else getattr(tokenizer, "chat_template", None) is not None


def render(
    tokenizer: Any, messages: Sequence[Message], *, open_reply: bool = False, thinking: bool
) -> Ids:
    """A conversation as the model sees it; `open_reply` begins the assistant's next turn."""
    ids = _template(tokenizer, messages, open_reply=open_reply, thinking=thinking, tokenize=True)
    # Tokenizers of transformers return a mapping, mlx-lm's wrapper a list.
    return tuple(ids["input_ids"] if isinstance(ids, Mapping) else ids)


def knows_thinking(tokenizer: Any) -> bool:
    """Whether the chat template writes another prompt when thinking is asked for."""
    if not has_template(tokenizer):
        return False
    question = [{"role": "user", "content": "?"}]
    on, off = (
        render(tokenizer, question, open_reply=True, thinking=thinking)
        for thinking in (True, False)
    )
    return on != off


def chat_rows(tokenizer: Any, preference: Preference, *, thinking: bool) -> Rows:
    """Ids through the model's chat template, strings as one user and one assistant turn.

    Raises:
        DataError: the template refuses the turns, or changes the prompt once a reply follows.
        BadPair: the prompt says nothing.
    """
    prompt = _turns(preference.prompt, "user")
    if not any(turn["content"] for turn in prompt):
        raise BadPair(preference.where, EMPTY_PROMPT)
    completions = (preference.chosen, preference.rejected)
    wholes = [[*prompt, *_turns(completion, "assistant")] for completion in completions]
    try:
        before = render(tokenizer, prompt, open_reply=True, thinking=thinking)
        rows = [render(tokenizer, whole, thinking=thinking) for whole in wholes]
        for row, whole in zip(rows, wholes, strict=True):
            if row[: len(before)] != before and not _text_begins(
                tokenizer, prompt, whole, thinking=thinking
            ):
                raise _no_boundary(tokenizer, preference.where, before, row)
    except TemplateError as error:
        raise DataError(
            f"{preference.where}: the model's chat template refuses the conversation ({error}); "
            "mend its turns, or take another model"
        ) from None
    return _split(before, rows)


def text_rows(tokenizer: Any, preference: Preference) -> Rows:
    """Ids of plain text, prompt and completion tokenized as one.

    Raises:
        BadPair: the prompt is empty and nothing else could predict the first token.
    """
    prompt = str(preference.prompt)
    completions = (preference.chosen, preference.rejected)
    rows = _split(
        _encode(tokenizer, prompt),
        [_encode(tokenizer, prompt + str(completion)) for completion in completions],
    )
    if rows.prompt:
        return rows
    if tokenizer.bos_token_id is None:
        found = "the tokenizer has no token that begins a text"
        raise BadPair(preference.where, EMPTY_PROMPT, found)
    return rows._replace(prompt=(tokenizer.bos_token_id,))


def shown(tokenizer: Any, ids: Ids) -> str:
    """Ids as text, for messages."""
    return f"`{tokenizer.decode(list(ids))}`".replace("\n", "\\n") if ids else "nothing"


def _text_begins(
    tokenizer: Any, prompt: Sequence[Message], whole: Sequence[Message], *, thinking: bool
) -> bool:
    """Whether it is only a token across the seam that makes the ids differ, not the template."""
    begin, text = (
        _template(tokenizer, turns, open_reply=turns is prompt, thinking=thinking, tokenize=False)
        for turns in (prompt, whole)
    )
    return text.startswith(begin)


def _no_boundary(tokenizer: Any, where: str, before: Ids, whole: Ids) -> DataError:
    at = _shared(before, whole)
    was, became = (shown(tokenizer, ids[at : at + 1]) for ids in (before, whole))
    return DataError(
        f"{where}: the chat template changes the prompt once a reply follows it "
        f"(token {at}: {was} became {became}), so nothing says where the reply begins; "
        "take a model whose template keeps the prompt"
    )


def _split(before: Ids, rows: Sequence[Ids]) -> Rows:
    """Cut where all agree: a token across the seam belongs to the completions, in both rows."""
    end = min(_shared(before, row) for row in rows)
    return Rows(before[:end], [row[end:] for row in rows], len(before) - end)


def _shared(first: Ids, second: Ids) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _turns(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _template(
    tokenizer: Any, messages: Sequence[Message], *, open_reply: bool, thinking: bool, tokenize: bool
) -> Any:
    # mlx-lm turns thinking on wherever a model knows it, so it is always said.
    return tokenizer.apply_chat_template(
        list(messages),
        add_generation_prompt=open_reply,
        tokenize=tokenize,
        enable_thinking=thinking,
    )


def _encode(tokenizer: Any, text: str) -> Ids:
    bos = getattr(tokenizer, "bos_token", None)
    has_bos = bos is not None and text.startswith(bos)
    return tuple(tokenizer.encode(text, add_special_tokens=not has_bos))
