"""Decide how an example is tokenized: as chat or plain text, with system turn and thinking mode."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mlx_dpo.data.chat_templates.render import has_template
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.schemas.messages import to_messages
from mlx_dpo.schemas.pairs import hh_rlhf
from mlx_dpo.types import PreferenceExample

SYSTEM_ROLES = ("system", "developer")  # roles of a system turn


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """Settings of the tokenization, and two facts about the model."""

    chat_template: str = "auto"
    thinking: bool | None = None
    system: str | None = None
    max_length: int = 1024
    truncation: str = "keep_start"
    vocab_size: int | None = None  # of the model; None: token ids are not checked
    context: int | None = None  # context length of the model; None: unknown

    @property
    def can_be_longer(self) -> bool:
        """Whether the model's context allows a larger `max_length`."""
        return self.context is None or self.max_length < self.context


class FormattedExample(NamedTuple):
    """An example as it will be tokenized: converted to messages, or left as plain text."""

    example: PreferenceExample
    as_chat: bool  # with the chat template
    was_dialogue: bool  # the text had turn marks, which became messages
    with_system: bool  # it begins with the system turn of the settings
    thinking: bool  # value of `enable_thinking` for the template


def format_example(
    tokenizer: Any, example: PreferenceExample, rules: TokenRules
) -> FormattedExample:
    """Convert the example to messages, if settings and chat template ask for it, or keep its text.

    Raises:
        DataError: messages without a template, or a row that contradicts `thinking`.
        ConfigError: `system` cannot be put before plain text.
    """
    turns = None
    if example.implicit_prompt and _can_be_chat(tokenizer, rules):
        turns = hh_rlhf.pair_to_messages(example)
    as_chat = _is_chat(tokenizer, turns or example, rules)
    formatted, with_system = _add_system(turns or example, rules, as_chat)
    thinking = _get_thinking(formatted, rules)
    return FormattedExample(formatted, as_chat, turns is not None, with_system, thinking)


def _can_be_chat(tokenizer: Any, rules: TokenRules) -> bool:
    return rules.chat_template != "text" and has_template(tokenizer)


def _is_chat(tokenizer: Any, example: PreferenceExample, rules: TokenRules) -> bool:
    if isinstance(example.prompt, str):
        if rules.chat_template == "chat":
            return True
        return _can_be_chat(tokenizer, rules) and not example.implicit_prompt
    if rules.chat_template == "text":
        raise DataError(
            f"{example.location}: messages cannot be used as plain text; write the pair as "
            "strings, "
            "or leave out --chat-template text"
        )
    if not has_template(tokenizer):
        raise DataError(
            f"{example.location}: messages need a chat template and the model has none; "
            "use a chat model, or write the pair as strings"
        )
    return True


def _add_system(
    example: PreferenceExample, rules: TokenRules, as_chat: bool
) -> tuple[PreferenceExample, bool]:
    """Add the system turn of the settings if the example has none.

    Returns the example, and whether it now begins with the system turn of the settings.
    """
    if rules.system is None:
        return example, False
    if not as_chat:
        raise ConfigError(
            f"{example.location}: `system` needs a chat template, and this pair is plain text; "
            "use a chat model, or leave out --system"
        )
    turns = to_messages(example.prompt, "user")
    if turns[0]["role"] in SYSTEM_ROLES:
        return example, turns[0]["content"] == rules.system
    return replace(example, prompt=({"role": "system", "content": rules.system}, *turns)), True


def _get_thinking(example: PreferenceExample, rules: TokenRules) -> bool:
    """Return the setting `thinking`, False by default.

    Raises:
        DataError: the row has another value in `chat_template_kwargs`.
    """
    own = example.template_kwargs.get("enable_thinking")
    if own is not None and rules.thinking is not None and own != rules.thinking:
        raise DataError(
            f"{example.location}: `chat_template_kwargs` has enable_thinking {own!r}, which "
            "contradicts --thinking; remove one of them"
        )
    return bool(rules.thinking)
