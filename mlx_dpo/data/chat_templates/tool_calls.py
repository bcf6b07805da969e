"""Bring tool calls into the form that a model's chat template takes.

Most templates write `arguments` with `tojson` or entry by entry, and want an object. Others, such
as DeepSeek's, put `arguments` between two texts, and want JSON text. Which one a template wants is
found out by rendering a call in each form.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from mlx_dpo.data.chat_templates.limits import UnusableTemplateError
from mlx_dpo.data.chat_templates.render import TemplateInput, call_template, template_text
from mlx_dpo.schemas.tool_calls import format_arguments
from mlx_dpo.types import Message

PROBE_NAME, PROBE_KEY, PROBE_VALUE = "probe_tool", "probe_key", "probe value"
PROBE_ID = "probe0123"  # Mistral's templates want nine letters or digits
PYTHON_DICT, ESCAPED_KEY = f"{{'{PROBE_KEY}'", f'\\"{PROBE_KEY}'  # an object as text; text quoted


class CallForm(NamedTuple):
    """The form of a tool call that a chat template takes."""

    wrapped: bool = True  # name and arguments are entries of `function`
    as_text: bool = False  # the arguments are JSON text


def fit_tool_calls(tokenizer: Any, messages: Sequence[Message]) -> Sequence[Message]:
    """Return the messages with tool calls in the form that the tokenizer's chat template takes.

    The calls must be those of `normalize_tool_calls`.

    Raises:
        TemplateError: the template takes objects, and arguments are text that is no JSON object.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    form = find_call_form(tokenizer)
    return [
        message | {"tool_calls": [_fit_call(call, form) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def find_call_form(tokenizer: Any) -> CallForm:
    """Return the form of a tool call that the tokenizer's chat template takes.

    This is the first form whose name and arguments the template writes without quoting them twice;
    `CallForm()` if the template writes no form so.
    """
    return _find_call_form(tokenizer, template_text(tokenizer))


@lru_cache(maxsize=8)
def _find_call_form(tokenizer: Any, template: str) -> CallForm:
    for wrapped, as_text in product((True, False), (False, True)):
        form = CallForm(wrapped, as_text)
        misread = ESCAPED_KEY if as_text else PYTHON_DICT
        for text in _render_probes(tokenizer, form):
            if PROBE_NAME in text and PROBE_VALUE in text and misread not in text:
                return form
    return CallForm()


def _render_probes(tokenizer: Any, form: CallForm) -> Iterator[str]:
    """Yield the text of each conversation with a call in this form that the template accepts."""
    function = {"name": PROBE_NAME, "arguments": {PROBE_KEY: PROBE_VALUE}}
    call = _fit_call({"id": PROBE_ID, "type": "function", "function": function}, form)
    turns: list[Message] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": PROBE_NAME, "tool_call_id": PROBE_ID, "content": "1"},
        {"role": "assistant", "content": "."},
    ]
    properties = {PROBE_KEY: {"type": "string", "description": ""}}
    parameters = {"type": "object", "properties": properties, "required": [PROBE_KEY]}
    # Without values of the call, which must come from the call itself.
    tool = {"name": "other_tool", "description": "", "parameters": parameters}
    with_tools = {"tools": [{"type": "function", "function": tool}]}
    for kwargs, length in product(({}, with_tools), (2, 4, 3)):
        try:
            yield call_template(
                tokenizer, TemplateInput(turns[:length], False, kwargs), tokenize=False
            )
        except UnusableTemplateError:
            raise
        except TemplateError:
            continue


def _fit_call(call: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function["arguments"]
    if form.as_text and not isinstance(arguments, str):
        function["arguments"] = format_arguments(arguments)
    elif not form.as_text and isinstance(arguments, str):
        raise TemplateError(
            f"the `arguments` of the tool call `{function['name'][:40]}` are not a JSON object "
            f"(found {arguments[:60]!r})"
        )
    if form.wrapped:
        return {**call, "function": function}
    return {name: value for name, value in call.items() if name != "function"} | function
