"""Text -> prompt ids and completion ids, with the boundary between them proved.

The chat template is applied here and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from mlx_dpo.data.tokenization.special_tokens import (
    NotPlainTextError,
    get_special_tokens,
    stop_tokens,
)
from mlx_dpo.errors import (
    EMPTY_PROMPT,
    SPECIAL_TOKEN,
    TEMPLATE_ERROR,
    BadPairError,
    ConfigError,
    DataError,
    PromptBoundaryError,
)
from mlx_dpo.schemas import hh_rlhf as dialogues
from mlx_dpo.schemas.messages import has_content, to_messages
from mlx_dpo.types import Message, PreferenceExample

Ids = tuple[int, ...]
# A template is a program: what it makes of turns that it was not written for is its own.
TEMPLATE_EXCEPTIONS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
NO_KWARGS: Mapping[str, Any] = {}


class TokenizedParts(NamedTuple):
    """A pair as ids, before anything is added or cut."""

    prompt: Ids
    completions: list[Ids]  # chosen, rejected
    moved: int  # prompt tokens that merge with a completion and went over to it


class TemplateInput(NamedTuple):
    """Turns, and how the template is asked to write them."""

    turns: Sequence[Message]
    thinking: bool
    given: Mapping[str, Any] = NO_KWARGS  # `tools` and the row's own arguments
    open_reply: bool = False  # begin the assistant's next turn
    unfinished: bool = False  # leave the last turn open


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer, mlx-lm's wrapper or one of transformers, has a chat template."""
    has = getattr(tokenizer, "has_chat_template", None)
    return has if has is not None else getattr(tokenizer, "chat_template", None) is not None


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], *, open_reply: bool = False, thinking: bool
) -> Ids:
    """A conversation as the model sees it; `open_reply` begins the assistant's next turn.

    A special token that stands in a message stays plain text.
    """
    return apply_template(tokenizer, TemplateInput(messages, thinking, open_reply=open_reply))


def apply_template(tokenizer: Any, asked: TemplateInput) -> Ids:
    """What the template writes, as token ids.

    Raises:
        NotPlainTextError: a special token stands in the turns, and it cannot be kept as plain text.
    """
    specials = get_special_tokens(tokenizer)
    if not specials.found([asked.turns, asked.given]):
        ids = _template(tokenizer, asked, tokenize=True)
        # Tokenizers of transformers return a mapping, mlx-lm's wrapper a list.
        return tuple(ids["input_ids"] if isinstance(ids, Mapping) else ids)
    turns, given = specials.marked(asked.turns), specials.marked(asked.given)
    text = _template(tokenizer, asked._replace(turns=turns, given=given), tokenize=False)
    if specials.unmarked(text) != _template(tokenizer, asked, tokenize=False):
        raise NotPlainTextError(
            "the template treats a special token within a message in its own way"
        )
    return tuple(specials.encode(tokenizer, text))


def has_thinking_mode(tokenizer: Any) -> bool:
    """Whether the chat template writes another prompt when thinking is asked for."""
    if not has_template(tokenizer):
        return False
    question = [{"role": "user", "content": "?"}]
    on, off = (
        encode_conversation(tokenizer, question, open_reply=True, thinking=thinking)
        for thinking in (True, False)
    )
    return on != off


def tokenize_as_chat(
    tokenizer: Any, preference: PreferenceExample, *, thinking: bool
) -> TokenizedParts:
    """Ids through the model's chat template, strings as one user and one assistant turn.

    A prompt that ends with the assistant's turn is continued by the completions.

    Raises:
        PromptBoundaryError: the template changes the prompt once a reply follows.
        BadPairError: the prompt says nothing, or the template refuses the turns.
    """
    prompt = to_messages(preference.prompt, "user")
    if not has_content(prompt):
        raise BadPairError(preference.location, EMPTY_PROMPT)
    continues = prompt[-1]["role"] == "assistant"
    asked = TemplateInput(prompt, thinking, preference.template_kwargs)
    before = asked._replace(open_reply=not continues, unfinished=continues)
    wholes = [
        asked._replace(turns=_joined(prompt, to_messages(completion, "assistant")))
        for completion in (preference.chosen, preference.rejected)
    ]
    try:
        opened = apply_template(tokenizer, before)
        rows = [apply_template(tokenizer, whole) for whole in wholes]
        for row, whole in zip(rows, wholes, strict=True):
            if row[: len(opened)] != opened and not _text_begins(tokenizer, before, whole):
                raise _no_boundary(tokenizer, preference.location, opened, row)
    except NotPlainTextError as error:
        raise BadPairError(preference.location, SPECIAL_TOKEN, str(error)) from None
    except TemplateError as error:
        found = " ".join(str(error).split())[:200]
        advice = "mend its turns, or take another model"
        raise BadPairError(preference.location, TEMPLATE_ERROR, found, advice=advice) from None
    return _split(opened, rows)


def later_turn_starts(
    tokenizer: Any, preference: PreferenceExample, *, thinking: bool
) -> list[int]:
    """Where the user's later turns begin in the prompt's ids, as far as the template tells."""
    turns = to_messages(preference.prompt, "user")
    whole = apply_template(tokenizer, TemplateInput(turns, thinking, preference.template_kwargs))
    starts = []
    for number, turn in enumerate(turns):
        if not number or turn["role"] != "user":
            continue
        try:
            before = apply_template(
                tokenizer, TemplateInput(turns[:number], thinking, preference.template_kwargs)
            )
        except (TemplateError, NotPlainTextError):
            continue
        if whole[: len(before)] == before:
            starts.append(len(before))
    return starts


def tokenize_as_text(
    tokenizer: Any, preference: PreferenceExample, *, controls: bool = False
) -> TokenizedParts:
    """Ids of plain text, prompt and completion tokenized as one.

    A special token within it stays plain text, but for one that begins the prompt or ends a
    completion as such tokens do; with `controls` all of them act.

    Raises:
        BadPairError: the prompt is empty and nothing else could predict the first token, or a
            special token cannot be kept as plain text.
    """
    prompt = str(preference.prompt)
    wholes = [prompt + str(text) for text in (preference.chosen, preference.rejected)]
    try:
        rows = _split(
            _encode(tokenizer, prompt, controls, ends=False),
            [_encode(tokenizer, whole, controls, ends=True) for whole in wholes],
        )
    except NotPlainTextError as error:
        raise BadPairError(preference.location, SPECIAL_TOKEN, str(error)) from None
    if rows.prompt:
        return rows
    if tokenizer.bos_token_id is None:
        found = "the tokenizer has no token that begins a text"
        raise BadPairError(preference.location, EMPTY_PROMPT, found)
    return rows._replace(prompt=(tokenizer.bos_token_id,))


def split_control_tokens(tokenizer: Any, text: str, *, ends: bool) -> tuple[str, str, str]:
    """A token that begins the text as the tokenizer would, the text, and one that ends it."""
    bos = getattr(tokenizer, "bos_token", None) or ""
    start = len(bos) if bos and text.startswith(bos) else 0
    end = len(text)
    if ends:
        body = text.rstrip()
        names = [tokenizer.convert_ids_to_tokens(number) for number in stop_tokens(tokenizer)]
        last = next((n for n in names if isinstance(n, str) and body[start:].endswith(n)), "")
        end = len(body) - len(last) if last else end
    return text[:start], text[start:end], text[end:]


def format_ids(tokenizer: Any, ids: Ids) -> str:
    """Ids as text, for messages."""
    return f"`{tokenizer.decode(list(ids))}`".replace("\n", "\\n") if ids else "nothing"


def _joined(prompt: tuple[Message, ...], completion: tuple[Message, ...]) -> list[Message]:
    """The turns with the completion's behind them, or going on with the last of them."""
    last, first = prompt[-1], completion[0]
    if last["role"] != "assistant":
        return [*prompt, *completion]
    joined = last | first | {"content": last["content"] + first["content"]}
    return [*prompt[:-1], joined, *completion[1:]]


def _text_begins(tokenizer: Any, before: TemplateInput, whole: TemplateInput) -> bool:
    """Whether it is only a token across the seam that makes the ids differ, not the template."""
    begin, text = (_template(tokenizer, asked, tokenize=False) for asked in (before, whole))
    return bool(text.startswith(begin))


def _no_boundary(tokenizer: Any, location: str, before: Ids, whole: Ids) -> PromptBoundaryError:
    at = _shared(before, whole)
    was, became = (format_ids(tokenizer, ids[at : at + 1]) for ids in (before, whole))
    return PromptBoundaryError(
        f"{location}: the chat template changes the prompt once a reply follows it "
        f"(token {at}: {was} became {became}), so nothing says where the reply begins; "
        "take a model whose template keeps the prompt"
    )


def _split(before: Ids, rows: Sequence[Ids]) -> TokenizedParts:
    """Cut where all agree: a token across the seam belongs to the completions, in both rows."""
    end = min(_shared(before, row) for row in rows)
    return TokenizedParts(before[:end], [row[end:] for row in rows], len(before) - end)


def _shared(first: Ids, second: Ids) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _template(tokenizer: Any, asked: TemplateInput, *, tokenize: bool) -> Any:
    # mlx-lm turns thinking on wherever a model knows it, so it is always said.
    told = {"enable_thinking": asked.thinking, **asked.given}
    if asked.unfinished:
        told["continue_final_message"] = True
    try:
        return tokenizer.apply_chat_template(
            list(asked.turns), add_generation_prompt=asked.open_reply, tokenize=tokenize, **told
        )
    except TEMPLATE_EXCEPTIONS as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error


def _encode(tokenizer: Any, text: str, controls: bool, *, ends: bool) -> Ids:
    begin, inner, end = split_control_tokens(tokenizer, text, ends=ends)
    specials = get_special_tokens(tokenizer)
    if controls or not specials.found(inner):
        return tuple(tokenizer.encode(text, add_special_tokens=not begin))
    ids = specials.encode(tokenizer, begin + specials.marked(inner) + end)
    opens = tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]
    return (tokenizer.bos_token_id, *ids) if opens and not begin else tuple(ids)


SYSTEM_ROLES = ("system", "developer")  # roles of a turn that comes before the conversation


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """The settings under which text becomes tokens."""

    chat_template: str = "auto"
    thinking: bool | None = None
    system: str | None = None
    max_length: int = 1024
    truncation: str = "keep_start"
    vocab_size: int | None = None  # of the model; None: ids are not checked


class FormattedPreference(NamedTuple):
    """A preference as it goes to the tokenizer."""

    said: PreferenceExample
    as_chat: bool
    was_dialogue: bool  # text that marks its turns, which became messages
    with_system: bool  # it begins with the system turn that was asked for
    thinking: bool  # whether the template is to open a thought


def format_preference(
    tokenizer: Any, given: PreferenceExample, rules: TokenRules
) -> FormattedPreference:
    """The form that the rules and the tokenizer's template give a preference.

    Raises:
        DataError: messages without a template, or a row that says otherwise than `thinking`.
        ConfigError: `system` cannot be put before plain text.
    """
    marked = (
        dialogues.pair_to_messages(given)
        if given.implicit_prompt and _may_chat(tokenizer, rules)
        else None
    )
    as_chat = _is_chat(tokenizer, marked or given, rules)
    said, with_system = _with_system(marked or given, rules, as_chat)
    return FormattedPreference(
        said, as_chat, marked is not None, with_system, _thinking(said, rules)
    )


def _may_chat(tokenizer: Any, rules: TokenRules) -> bool:
    return rules.chat_template != "text" and has_template(tokenizer)


def _is_chat(tokenizer: Any, preference: PreferenceExample, rules: TokenRules) -> bool:
    if isinstance(preference.prompt, str):
        if rules.chat_template == "chat":
            return True
        return _may_chat(tokenizer, rules) and not preference.implicit_prompt
    if rules.chat_template == "text":
        raise DataError(
            f"{preference.location}: messages cannot stay plain text; write the pair as strings, "
            "or leave out --chat-template text"
        )
    if not has_template(tokenizer):
        raise DataError(
            f"{preference.location}: messages need a chat template and the model has none; "
            "take a chat model, or write the pair as strings"
        )
    return True


def _with_system(
    preference: PreferenceExample, rules: TokenRules, as_chat: bool
) -> tuple[PreferenceExample, bool]:
    """The pair after the system turn that was asked for, where it has none."""
    if rules.system is None:
        return preference, False
    if not as_chat:
        raise ConfigError(
            f"{preference.location}: `system` needs a chat template, and this pair stays plain "
            "text; take a chat model, or leave out --system"
        )
    turns = to_messages(preference.prompt, "user")
    if turns[0]["role"] in SYSTEM_ROLES:
        return preference, turns[0]["content"] == rules.system
    return replace(preference, prompt=({"role": "system", "content": rules.system}, *turns)), True


def _thinking(preference: PreferenceExample, rules: TokenRules) -> bool:
    """Whether the template is to open a thought; the row's own word counts where none was asked."""
    own = preference.template_kwargs.get("enable_thinking")
    if own is not None and rules.thinking is not None and own != rules.thinking:
        raise DataError(
            f"{preference.location}: `chat_template_kwargs` has enable_thinking {own!r}, and "
            f"--thinking says otherwise; leave out one of them"
        )
    return bool(rules.thinking)
