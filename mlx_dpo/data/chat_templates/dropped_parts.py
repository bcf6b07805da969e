"""Find out which parts of a conversation a chat template leaves out.

A part is changed, and the conversation is rendered again: if the text stays the same, the template
does not write the part. The result for one part is valid for all parts of the same kind, in a
message of the same role with the same fields, in the same position. So a data set needs only a few
further renderings.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from mlx_dpo.data.chat_templates.limits import UnusableTemplateError
from mlx_dpo.data.chat_templates.render import TemplateInput, template_text
from mlx_dpo.types import Message

Render = Callable[[TemplateInput], str]
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
OTHER_PARTS = frozenset({"role", "content", "tool_calls", "tool_call_id", "id", *REASONING_FIELDS})
THOUGHT_START, THOUGHT_END = "<think>", "</think>"
SCALARS = (str, int, float)
PROBE_TEXT = "zq"  # text by which a part is changed
CONTENT, REASONING, TOOL_CALL, TOOLS = "content", "reasoning", "tool call", "tools"
# Parts whose loss changes what is learned. Of reasoning, only that in a completion is one: many
# templates leave out the reasoning of earlier turns.
ESSENTIAL = frozenset({CONTENT, TOOL_CALL})


class DroppedPart(NamedTuple):
    """A part of a conversation that the chat template drops."""

    name: str  # `content`, `reasoning`, `tool call`, `tools` or the name of a message's field
    message: int  # its index; -1 for `tools`
    in_completion: bool
    detail: str = ""

    @property
    def is_error(self) -> bool:
        """True if the model would be trained on another conversation than the row describes."""
        return self.name in ESSENTIAL or (self.name == REASONING and self.in_completion)

    def describe(self, first_in_completion: int, completion: str) -> str:
        """Return the part as text, such as ``the content of `prompt[0]```.

        Args:
            first_in_completion: index of the first message of the completion.
            completion: name of the completion's field, `chosen` or `rejected`.
        """
        where = f"`prompt[{self.message}]`"
        if self.in_completion:
            where = f"`{completion}[{self.message - first_in_completion}]`"
        return f"the {self.name} of {where}" + (f": {self.detail}" if self.detail else "")


class _Part(NamedTuple):
    name: str  # as in `DroppedPart`
    which: tuple[Any, ...]  # of several parts of a message with this name


def find_dropped_parts(
    tokenizer: Any, render: Render, whole: TemplateInput, first_in_completion: int
) -> list[DroppedPart]:
    """Return the parts of a conversation that the chat template leaves out.

    Args:
        tokenizer: the tokenizer.
        render: function that returns the text of a conversation in the chat template.
        whole: the conversation, with the completion.
        first_in_completion: index of the first message of the completion.
    """
    known, text = _known_parts(tokenizer, template_text(tokenizer)), None
    dropped = []
    for part, index, key in _parts(whole, first_in_completion):
        if key not in known:
            text = render(whole) if text is None else text
            known[key] = _has_trace(text, _change_part(whole, part, index), render)
        if not known[key]:
            detail = _detail(whole, part, index)
            dropped.append(DroppedPart(part.name, index, index >= first_in_completion, detail))
    return dropped


def _has_trace(text: str, changed: TemplateInput, render: Render) -> bool:
    try:
        return render(changed) != text
    except UnusableTemplateError:
        raise
    except TemplateError:  # the template reads the part, as it refuses another one
        return True


@lru_cache(maxsize=8)
def _known_parts(tokenizer: Any, template: str) -> dict[tuple[Any, ...], bool]:
    """Return a dictionary to fill: for a part's key, whether the chat template writes the part."""
    return {}


def _parts(
    whole: TemplateInput, first_in_completion: int
) -> Iterator[tuple[_Part, int, tuple[Any, ...]]]:
    """Yield (part, index of its message, key); parts with the same key are written the same way."""
    messages, tools = whole.messages, whole.template_kwargs.get(TOOLS)
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    last_user = users[-1] if users else -1
    switches = frozenset(
        (name, value) for name, value in whole.template_kwargs.items() if isinstance(value, SCALARS)
    )
    common = (whole.thinking, bool(tools), switches)
    for index, message in enumerate(messages):
        before = messages[index - 1]["role"] if index else ""
        position = (index >= first_in_completion, index > last_user, index == len(messages) - 1)
        shape = _shape(message)
        for part in _parts_of_message(message):
            yield part, index, (part, shape, before, position, common)
    if tools:
        yield _Part(TOOLS, ()), -1, (TOOLS, messages[0]["role"], messages[-1]["role"], common)


def _shape(message: Message) -> tuple[Any, ...]:
    """Return what a template may decide by: the role, the fields that are not empty, the calls."""
    fields = frozenset(name for name, value in message.items() if value)
    calls = len(message.get("tool_calls") or ())
    return message["role"], fields, calls, THOUGHT_END in message["content"]


def _parts_of_message(message: Message) -> Iterator[_Part]:
    content = message["content"]
    if content.strip():
        yield _Part(CONTENT, ())
    if message["role"] == "assistant" and _thought(content):
        yield _Part(REASONING, (THOUGHT_END,))
    if any(message.get(name) for name in REASONING_FIELDS):
        yield _Part(REASONING, ())
    for name, value in message.items():
        # The name of a tool's answer is in the call before it.
        is_other = name not in OTHER_PARTS and (name, message["role"]) != ("name", "tool")
        if is_other and isinstance(value, str) and value:
            yield _Part(name, ())
    for number in range(len(message.get("tool_calls") or ())):
        yield _Part(TOOL_CALL, (number, "name"))
        yield _Part(TOOL_CALL, (number, "arguments"))


def _thought(content: str) -> str:
    """Return the text before the mark that ends a thought in an answer, or "" without one."""
    thought, mark, _ = content.partition(THOUGHT_END)
    return thought.replace(THOUGHT_START, "").strip() if mark else ""


def _change_part(whole: TemplateInput, part: _Part, index: int) -> TemplateInput:
    """Return the conversation with another part in the place of this one."""
    if part.name == TOOLS:
        tools = [_change_tool(tool) for tool in whole.template_kwargs[TOOLS]]
        return whole._replace(template_kwargs={**whole.template_kwargs, TOOLS: tools})
    message = whole.messages[index]
    changed = message | _changed_fields(message, part)
    return whole._replace(messages=[*whole.messages[:index], changed, *whole.messages[index + 1 :]])


def _changed_fields(message: Message, part: _Part) -> dict[str, Any]:
    if part.name == TOOL_CALL:
        number, entry = part.which
        calls = [*message["tool_calls"]]
        calls[number] = _change_call(calls[number], entry)
        return {"tool_calls": calls}
    if part.name == REASONING and not part.which:
        return {
            name: f"{message[name]}{PROBE_TEXT}" for name in REASONING_FIELDS if message.get(name)
        }
    if part.name == REASONING:
        return {"content": message["content"].replace(THOUGHT_END, PROBE_TEXT + THOUGHT_END, 1)}
    return {part.name: message[part.name].rstrip() + PROBE_TEXT}


def _change_call(call: Mapping[str, Any], entry: str) -> dict[str, Any]:
    function = call["function"]
    value = function[entry]
    changed = f"{value}{PROBE_TEXT}" if isinstance(value, str) else {**value, PROBE_TEXT: 1}
    return {**call, "function": function | {entry: changed}}


def _change_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool's description with another name."""
    function = tool.get("function")
    if isinstance(function, Mapping):
        return {**tool, "function": _change_tool(function)}
    return {**tool, "name": f"{tool.get('name', '')}{PROBE_TEXT}"}


def _detail(whole: TemplateInput, part: _Part, index: int) -> str:
    if part.name == TOOL_CALL:
        number, entry = part.which
        call = whole.messages[index]["tool_calls"][number]
        return f"{entry} of `{call['function']['name'][:40]}`"
    return f"before `{THOUGHT_END}`" if part.which else ""
