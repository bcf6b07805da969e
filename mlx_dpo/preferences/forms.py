"""Which form a preference is tokenized in: turns for the chat template, or plain text."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.preferences.boundary import has_template
from mlx_dpo.preferences.schemas import dialogues
from mlx_dpo.preferences.schemas.messages import as_turns
from mlx_dpo.types import Preference

SYSTEM = ("system", "developer")  # roles of a turn that comes before the conversation


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """The settings under which text becomes tokens."""

    chat_template: str = "auto"
    thinking: bool | None = None
    system: str | None = None
    max_length: int = 1024
    truncation: str = "keep_start"
    vocab_size: int


class Form(NamedTuple):
    """A preference as it goes to the tokenizer."""

    said: Preference
    as_chat: bool
    was_dialogue: bool  # text that marks its turns, which became messages
    with_system: bool  # it begins with the system turn that was asked for
    thinking: bool  # whether the template is to open a thought


def form_of(tokenizer: Any, given: Preference, rules: TokenRules) -> Form:
    """The form that the rules and the tokenizer's template give a preference.

    Raises:
        DataError: messages without a template, or a row that says otherwise than `thinking`.
        ConfigError: `system` cannot be put before plain text.
    """
    marked = dialogues.as_messages(given) if given.whole and _may_chat(tokenizer, rules) else None
    as_chat = _is_chat(tokenizer, marked or given, rules)
    said, with_system = _with_system(marked or given, rules, as_chat)
    return Form(said, as_chat, marked is not None, with_system, _thinking(said, rules))


def _may_chat(tokenizer: Any, rules: TokenRules) -> bool:
    return rules.chat_template != "text" and has_template(tokenizer)


def _is_chat(tokenizer: Any, preference: Preference, rules: TokenRules) -> bool:
    if isinstance(preference.prompt, str):
        if rules.chat_template == "chat":
            return True
        return _may_chat(tokenizer, rules) and not preference.whole
    if rules.chat_template == "text":
        raise DataError(
            f"{preference.where}: messages cannot stay plain text; write the pair as strings, "
            "or leave out --chat-template text"
        )
    if not has_template(tokenizer):
        raise DataError(
            f"{preference.where}: messages need a chat template and the model has none; "
            "take a chat model, or write the pair as strings"
        )
    return True


def _with_system(
    preference: Preference, rules: TokenRules, as_chat: bool
) -> tuple[Preference, bool]:
    """The pair after the system turn that was asked for, where it has none."""
    if rules.system is None:
        return preference, False
    if not as_chat:
        raise ConfigError(
            f"{preference.where}: `system` needs a chat template, and this pair stays plain text; "
            "take a chat model, or leave out --system"
        )
    turns = as_turns(preference.prompt, "user")
    if turns[0]["role"] in SYSTEM:
        return preference, turns[0]["content"] == rules.system
    return replace(preference, prompt=({"role": "system", "content": rules.system}, *turns)), True


def _thinking(preference: Preference, rules: TokenRules) -> bool:
    """Whether the template is to open a thought; the row's own word counts where none was asked."""
    own = preference.given.get("enable_thinking")
    if own is not None and rules.thinking is not None and own != rules.thinking:
        raise DataError(
            f"{preference.where}: `chat_template_kwargs` has enable_thinking {own!r}, and "
            f"--thinking says otherwise; leave out one of them"
        )
    return bool(rules.thinking)
