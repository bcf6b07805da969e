"""Render messages with a tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from mlx_dpo.data.chat_templates.sandbox import install_limits
from mlx_dpo.data.chat_templates.template_date import printing_day_of
from mlx_dpo.types import Message

# A template is a program: for messages that it was not written for it can raise anything.
TEMPLATE_EXCEPTIONS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
NO_KWARGS: Mapping[str, Any] = {}


class TemplateInput(NamedTuple):
    """Messages and arguments for the chat template."""

    messages: Sequence[Message]
    thinking: bool
    template_kwargs: Mapping[str, Any] = NO_KWARGS  # `tools` and the row's own arguments
    add_generation_prompt: bool = False  # begin the assistant's next turn
    continue_final_message: bool = False  # leave the last turn open


def has_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer has a chat template.

    The tokenizer may be mlx-lm's wrapper or one of transformers.
    """
    has = getattr(tokenizer, "has_chat_template", None)
    return has if has is not None else getattr(tokenizer, "chat_template", None) is not None


def template_text(tokenizer: Any) -> str:
    """Return the source text of the tokenizer's chat template, or of all its named templates."""
    return str(getattr(tokenizer, "chat_template", "") or "")


def call_template(tokenizer: Any, template_input: TemplateInput, *, tokenize: bool) -> Any:
    """Return the conversation in the chat template: its text or, with `tokenize`, its token ids.

    Messages reach the template as they are; `chat_template` brings tool calls into its form first.

    Raises:
        TemplateError: the template refuses the messages, or fails on them.
    """
    # mlx-lm enables thinking for every model that has it, so the argument is always passed.
    kwargs = {"enable_thinking": template_input.thinking, **template_input.template_kwargs}
    if template_input.continue_final_message:
        kwargs["continue_final_message"] = True
    install_limits()
    try:
        with printing_day_of(tokenizer):
            return tokenizer.apply_chat_template(
                list(template_input.messages),
                add_generation_prompt=template_input.add_generation_prompt,
                tokenize=tokenize,
                **kwargs,
            )
    except TEMPLATE_EXCEPTIONS as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error
