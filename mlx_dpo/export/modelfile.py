"""Write Ollama's Modelfile: the weights, the chat template in Go's syntax, and the stop tokens.

Ollama does not run Jinja templates. Its templates (Go's `text/template`) see a list of messages.
A chat template that puts fixed text around each message is translated. The translation is checked:
conversations must be the same text in both.

Source: https://docs.ollama.com/modelfile
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from mlx_dpo.data.chat_templates.render import TemplateInput, call_template
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.types import Message

TEXTS = ("Alpha one", "Beta: two?", "Gamma, three.", "Delta four!", "Epsilon 5")
WITHOUT_SYSTEM = (  # roles of conversations by which a translated template is checked
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)
WITH_SYSTEM = (("system", "user"), ("system", "user", "assistant", "user"))
UNSAFE = ("{{", "}}", '"""')  # a Modelfile or a Go template would read these as syntax
NO_TRANSLATION = (
    "its chat template does more than put fixed text around messages, so it cannot be translated "
    "for Ollama; use --to hf --gguf FILE and write the Modelfile by hand"
)


class _UntranslatableError(Exception):
    """The chat template is not fixed text around each message."""


@dataclass(frozen=True)
class MessageMarks:
    """The fixed text that a chat template puts around the messages of each role.

    Attributes:
        before: text before a message, by role.
        after: text after a message, by role.
        start: text before the first message, without the beginning-of-sequence token.
        answer: text with which the answer of the model begins.
        default_system: system message of conversations that have none; None without one.
        joins_system: whether the system message stands inside the first user turn (Gemma).
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    start: str
    answer: str
    default_system: str | None = None
    joins_system: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation that `go_template` makes."""
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        text = self.start
        for index, message in enumerate(messages):
            role = message["role"]
            is_joined = self.joins_system and index == 1 and messages[0]["role"] == "system"
            text += "" if is_joined else self.before[role]
            text += message["content"] + self.after[role]
        return text + self.answer

    def go_template(self) -> str:
        """Return the template in the syntax of Go's `text/template`."""
        cases = []
        for role, before in self.before.items():
            if role == "user" and self.joins_system:
                second = 'or (ne $i 1) (ne (index $.Messages 0).Role "system")'
                before = f"{{{{ if {second} }}}}{before}{{{{ end }}}}"
            cases.append(
                f'if eq $m.Role "{role}" }}}}{before}{{{{ $m.Content }}}}{self.after[role]}'
            )
        body = "{{ " + "{{ else ".join(cases) + "{{ end }}"
        return f"{self.start}{{{{ range $i, $m := .Messages }}}}{body}{{{{ end }}}}{self.answer}"


def translate_chat_template(tokenizer: Any, source: str, *, thinking: bool) -> MessageMarks:
    """Return the text that a tokenizer's chat template puts around messages.

    Args:
        source: name of the model for error messages.
        thinking: whether the template's thinking mode is on.

    Raises:
        ModelError: the template does more than put fixed text around messages.
    """
    try:
        marks = _find_marks(tokenizer, thinking)
        conversations = [*WITHOUT_SYSTEM, *(WITH_SYSTEM if "system" in marks.before else ())]
        for roles in conversations:
            messages = _conversation(roles)
            if marks.render(messages) != _render(tokenizer, messages, thinking):
                raise _UntranslatableError
        parts = (*marks.before.values(), *marks.after.values(), marks.start, marks.answer)
        if any(syntax in part for part in parts for syntax in UNSAFE):
            raise _UntranslatableError
    except _UntranslatableError:
        raise ModelError(f"{source}: {NO_TRANSLATION}") from None
    except TemplateError as error:
        raise ModelError(f"{source}: its chat template fails ({reason(error)})") from error
    return marks


def _find_marks(tokenizer: Any, thinking: bool) -> MessageMarks:
    """Derive the marks from four conversations, by the text between their messages.

    Two marks that always follow each other can be split anywhere between them; the split is where
    the conversations begin to differ.
    """
    start_user, user_answer = _gaps(tokenizer, ("user",), thinking)
    _, user_assistant, assistant_user, _ = _gaps(tokenizer, ("user", "assistant", "user"), thinking)
    after_user = _common_prefix(user_answer, user_assistant)
    before_user = _common_suffix(start_user, assistant_user)
    before = {"user": before_user, "assistant": user_assistant.removeprefix(after_user)}
    after = {"user": after_user, "assistant": assistant_user.removesuffix(before_user)}
    start, answer = start_user.removesuffix(before_user), user_answer.removeprefix(after_user)
    plain = MessageMarks(before, after, start, answer)
    try:
        start_system, system_user, _ = _gaps(tokenizer, ("system", "user"), thinking)
    except (TemplateError, _UntranslatableError):
        return plain  # no place for a system message
    if not system_user.endswith(before_user):
        return MessageMarks(
            {"system": before_user, **before}, {"system": system_user, **after}, start, answer,
            joins_system=True,
        )  # fmt: skip
    after_system = system_user.removesuffix(before_user)
    if start_system.startswith(start):
        marks = {"system": start_system.removeprefix(start), **before}
        return MessageMarks(marks, {"system": after_system, **after}, start, answer)
    # Without a system message, the template writes one of its own.
    if not (start.startswith(start_system) and start.endswith(after_system)):
        raise _UntranslatableError
    default = start.removeprefix(start_system).removesuffix(after_system)
    return MessageMarks(
        {"system": start_system, **before}, {"system": after_system, **after}, "", answer, default
    )


def _gaps(tokenizer: Any, roles: Sequence[str], thinking: bool) -> list[str]:
    """Return the text before, between and after the messages of a conversation."""
    messages = _conversation(roles)
    rest, gaps = _render(tokenizer, messages, thinking), []
    for message in messages:
        gap, found, rest = rest.partition(message["content"])
        if not found:
            raise _UntranslatableError
        gaps.append(gap)
    return [*gaps, rest]


def _conversation(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": text} for role, text in zip(roles, TEXTS, strict=False)]


def _render(tokenizer: Any, messages: Sequence[Message], thinking: bool) -> str:
    """Return a conversation in the chat template, up to the answer and without the BOS token.

    llama.cpp adds the BOS token itself.
    """
    template_input = TemplateInput(messages, thinking, add_generation_prompt=True)
    text = str(call_template(tokenizer, template_input, tokenize=False))
    return text.removeprefix(tokenizer.bos_token or "")


def _common_suffix(first: str, second: str) -> str:
    return _common_prefix(first[::-1], second[::-1])[::-1]


def _common_prefix(first: str, second: str) -> str:
    pairs = enumerate(zip(first, second, strict=False))
    return first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))]


def make_modelfile(
    weights: str,
    marks: MessageMarks | None,
    *,
    system: str | None,
    stop: Sequence[str],
    adapter: str | None = None,
) -> str:
    """Return the text of a Modelfile.

    Args:
        weights: the GGUF file relative to the Modelfile, or the name of a model of Ollama.
        marks: the chat template; None to leave it to the weights.
        system: system message of conversations that have none; by default the template's own.
        stop: texts of the tokens that end an answer.
        adapter: folder of a LoRA adapter, relative to the Modelfile.

    Raises:
        ModelError: the system message holds three quotation marks, or has no place in the template.
    """
    lines = [f"FROM {weights}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    if marks is not None:
        lines.append(f'TEMPLATE """{marks.go_template()}"""')
        if system is not None and "system" not in marks.before:
            raise ModelError(
                "the run has a system message, but its chat template has no place for it"
            )
        system = marks.default_system if system is None else system
    if system is not None:
        if '"""' in system:
            raise ModelError('a Modelfile cannot hold a system message with `"""`')
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{text}"' for text in stop]
    text = "\n".join(lines) + "\n"
    if not text.replace("\n", "").isprintable():  # Ollama's parser drops tabs and the like
        raise ModelError(
            "a Modelfile cannot hold a tab or another character that is not printed, but the chat "
            "template or the system message has one"
        )
    return text
