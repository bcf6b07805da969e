"""Encode prompts as token ids: a conversation in the model's chat template, or plain text."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from mlx_dpo.data.tokenization.chat_template import encode_conversation, has_thinking_mode
from mlx_dpo.errors import ConfigError, ModelError, reason
from mlx_dpo.types import Message


def check_thinking(tokenizer: Any) -> None:
    """Check that the chat template has a thinking mode, which the setting `thinking` needs.

    Raises:
        ConfigError: the template renders the same text with and without thinking.
    """
    if not has_thinking_mode(tokenizer):
        raise ConfigError(
            "`thinking` has no effect; the model's chat template has no thinking mode"
        )


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], *, thinking: bool | None = None
) -> list[int]:
    """Return the token ids of the conversation, ending where the model's answer begins.

    Thinking is off unless `thinking` is true, as in training.

    Raises:
        ModelError: the chat template refuses the messages, or writes nothing.
    """
    try:
        ids = encode_conversation(
            tokenizer, messages, add_generation_prompt=True, thinking=bool(thinking)
        )
    except TemplateError as error:
        raise ModelError(
            f"the model's chat template refuses the conversation ({reason(error)}); use a model "
            "with another chat template"
        ) from None
    if not ids:
        raise ModelError(
            "the model's chat template drops the whole conversation; use a model with "
            "another chat template"
        )
    return list(ids)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a plain text that the model is to continue.

    A beginning-of-sequence token is added if the tokenizer adds one; an end token is never added.
    """
    body = list(tokenizer.encode(text, add_special_tokens=False))
    with_special_tokens = list(tokenizer.encode(text))
    begin = tokenizer.bos_token_id
    needs_begin = with_special_tokens[:1] == [begin] and body[:1] != [begin]
    return [begin, *body] if needs_begin else body
