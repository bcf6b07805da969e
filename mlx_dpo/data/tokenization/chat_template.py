"""Tokenize text or messages, with the chat template, and separate prompt and completion ids.

The boundary between prompt and completion is checked
on the token ids of every pair.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from mlx_dpo.data.chat_templates.dropped_parts import REASONING, find_dropped_parts
from mlx_dpo.data.chat_templates.limits import UnusableTemplateError
from mlx_dpo.data.chat_templates.render import TemplateInput, call_template, has_template
from mlx_dpo.data.chat_templates.tool_calls import fit_tool_calls
from mlx_dpo.data.tokenization.assistant_turns import (
    changed_turn_error,
    find_gaps,
    has_several_answers,
)
from mlx_dpo.data.tokenization.special_tokens import (
    NotPlainTextError,
    end_of_stop,
    get_special_tokens,
    stop_tokens,
)
from mlx_dpo.errors import (
    EMPTY_PROMPT,
    NOT_WRITTEN,
    SPECIAL_TOKEN,
    TEMPLATE_ERROR,
    BadPairError,
    ModelError,
    PromptBoundaryError,
    reason,
)
from mlx_dpo.schemas.messages import has_content, to_messages
from mlx_dpo.types import Message, PreferenceExample, Text

Ids = tuple[int, ...]


class TokenizedParts(NamedTuple):
    """Prompt and completions as token ids, before stop tokens are added and before truncation."""

    prompt: Ids
    completions: list[Ids]  # chosen, rejected; one if both are equal
    moved: int  # prompt tokens that merge with a completion and were moved to it
    gaps: tuple[tuple[int, int], ...] = ()  # ranges of the completion between two scored turns
    unwritten: frozenset[str] = frozenset()  # parts without a trace in the chat template


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    thinking: bool,
) -> Ids:
    """Return the token ids of a conversation in the chat template.

    Special tokens in the text of a message stay plain text.
    """
    template_input = TemplateInput(messages, thinking, add_generation_prompt=add_generation_prompt)
    return apply_template(tokenizer, template_input)


def apply_template(tokenizer: Any, template_input: TemplateInput) -> Ids:
    """Return the token ids of messages in the chat template.

    Raises:
        NotPlainTextError: a message contains a special token that cannot be kept as plain text.
    """
    specials = get_special_tokens(tokenizer)
    messages, kwargs = template_input.messages, template_input.template_kwargs
    if not specials.find([messages, kwargs]):
        ids = _render(tokenizer, template_input, tokenize=True)
        # Tokenizers of transformers return a mapping, mlx-lm's wrapper a list.
        return tuple(ids["input_ids"] if isinstance(ids, Mapping) else ids)
    marked = template_input._replace(
        messages=specials.mark(messages), template_kwargs=specials.mark(kwargs)
    )
    text = _render(tokenizer, marked, tokenize=False)
    if specials.unmark(text) != _render(tokenizer, template_input, tokenize=False):
        raise NotPlainTextError(
            "the template treats a special token within a message in its own way"
        )
    return tuple(specials.encode(tokenizer, text))


def has_thinking_mode(tokenizer: Any) -> bool:
    """Return whether the chat template has a thinking mode.

    A template has one if its argument `enable_thinking` changes the token ids of a prompt.

    Raises:
        ModelError: the template refuses even a single question.
    """
    if not has_template(tokenizer):
        return False
    question = [{"role": "user", "content": "?"}]
    try:
        on, off = (
            encode_conversation(tokenizer, question, add_generation_prompt=True, thinking=thinking)
            for thinking in (True, False)
        )
    except TemplateError as error:
        raise _unusable("`thinking`", error) from None
    return on != off


def tokenize_as_chat(
    tokenizer: Any, example: PreferenceExample, *, thinking: bool
) -> TokenizedParts:
    """Tokenize prompt and completions in the model's chat template.

    Strings become one user and one assistant turn. If the prompt ends with an assistant turn, the
    completions continue that turn. Equal completions (an unpaired example) are tokenized once.

    Raises:
        PromptBoundaryError: the template changes the prompt once a completion follows it.
        BadPairError: the prompt is empty, or the template raises an error for the messages.
        ModelError: the template cannot be used at all.
    """
    prompt = to_messages(example.prompt, "user")
    if not has_content(prompt):
        raise BadPairError(example.location, EMPTY_PROMPT)
    continues = prompt[-1]["role"] == "assistant"
    whole = TemplateInput(prompt, thinking, example.template_kwargs)
    before = whole._replace(add_generation_prompt=not continues, continue_final_message=continues)
    wholes = [
        whole._replace(messages=_join(prompt, to_messages(completion, "assistant")))
        for completion in _completions(example)
    ]
    try:
        prompt_ids = apply_template(tokenizer, before)
        rows = [apply_template(tokenizer, whole) for whole in wholes]
        for row, whole in zip(rows, wholes, strict=True):
            if row[: len(prompt_ids)] != prompt_ids and not _is_prefix(tokenizer, before, whole):
                if has_several_answers(whole.messages[len(prompt) :]):
                    raise changed_turn_error(example.location, len(prompt))
                remedy = _find_remedy(tokenizer, before, whole)
                raise _boundary_error(tokenizer, example.location, prompt_ids, row, remedy)
        gaps = _find_gaps(tokenizer, wholes[0], len(prompt), rows[0], example.location)
        unwritten = _find_unwritten(tokenizer, wholes, len(prompt) - continues, example.location)
    except NotPlainTextError as error:
        raise BadPairError(example.location, SPECIAL_TOKEN, str(error)) from None
    except UnusableTemplateError as error:
        raise _unusable(example.location, error) from None
    except TemplateError as error:
        message = " ".join(str(error).split())[:200]
        advice = "fix its turns, or use another model"
        raise BadPairError(example.location, TEMPLATE_ERROR, message, advice=advice) from None
    parts = _split(prompt_ids, rows)
    start = len(parts.prompt)
    inside = tuple((first - start, last - start) for first, last in gaps if first < last)
    return parts._replace(unwritten=unwritten, gaps=inside)


def _completions(example: PreferenceExample) -> tuple[Text, ...]:
    """Return both completions, or one if they are equal."""
    if example.chosen == example.rejected:
        return (example.chosen,)
    return example.chosen, example.rejected


def _find_gaps(
    tokenizer: Any, whole: TemplateInput, first: int, ids: Ids, location: str
) -> list[tuple[int, int]]:
    """Return the ranges of `ids`, a conversation, between the assistant's turns from `first` on."""
    stops, text = stop_tokens(tokenizer), partial(_text, tokenizer)

    def part(count: int, opens: bool) -> TemplateInput:
        return whole._replace(messages=whole.messages[:count], add_generation_prompt=opens)

    def trim(prefix: Ids) -> Ids:
        return prefix[: end_of_stop(tokenizer, prefix, stops) or len(prefix)]

    return find_gaps(
        whole.messages,
        first,
        ids,
        encode=lambda count, opens: apply_template(tokenizer, part(count, opens)),
        starts_with=lambda count, opens: text(whole).startswith(text(part(count, opens))),
        trim=trim,
        location=location,
    )


def _unusable(location: str, error: TemplateError) -> ModelError:
    return ModelError(f"{location}: {reason(error)}; use a model with another chat template")


def _find_unwritten(
    tokenizer: Any, wholes: Sequence[TemplateInput], first_in_completion: int, location: str
) -> frozenset[str]:
    """Return the names of the parts of the conversations that the chat template leaves out.

    Raises:
        BadPairError: such a part changes what the pair says.
    """
    find, names = partial(find_dropped_parts, tokenizer, partial(_text, tokenizer)), set[str]()
    for whole, completion in zip(wholes, ("chosen", "rejected"), strict=False):
        parts = find(whole, first_in_completion)
        if faults := [part for part in parts if part.is_error]:
            found = faults[0].describe(first_in_completion, completion)
            advice = "use a model whose template includes it"
            if not whole.thinking and faults[0].name == REASONING:
                on = whole._replace(thinking=True)
                if not any(part.is_error for part in find(on, first_in_completion)):
                    advice = "add --thinking, with which the template includes it"
            raise BadPairError(location, NOT_WRITTEN, found, advice=advice)
        names.update(part.name for part in parts)
    return frozenset(names)


def _text(tokenizer: Any, template_input: TemplateInput) -> str:
    return str(_render(tokenizer, template_input, tokenize=False))


def later_turn_starts(tokenizer: Any, example: PreferenceExample, *, thinking: bool) -> list[int]:
    """Return the positions in the prompt's token ids at which user turns begin.

    The position of a turn is the number of token ids of the messages before it. The first
    message is left out, and so is a turn if those token ids are not a prefix of the prompt's.
    """
    messages = to_messages(example.prompt, "user")
    whole = TemplateInput(messages, thinking, example.template_kwargs)
    try:
        ids = apply_template(tokenizer, whole)
    except (TemplateError, NotPlainTextError):  # the template refuses a prompt without an answer
        return []
    starts = []
    for number, message in enumerate(messages):
        if not number or message["role"] != "user":
            continue
        try:
            before = apply_template(tokenizer, whole._replace(messages=messages[:number]))
        except (TemplateError, NotPlainTextError):
            continue
        if ids[: len(before)] == before:
            starts.append(len(before))
    return starts


def tokenize_as_text(
    tokenizer: Any, example: PreferenceExample, *, controls: bool = False
) -> TokenizedParts:
    """Tokenize an example as plain text; prompt and completion are tokenized as one text.

    Special tokens in the text stay plain text, except for a BOS token that begins the prompt and a
    stop token that ends a completion. With `controls`, all special tokens are control tokens.

    Raises:
        BadPairError: the prompt is empty and the tokenizer has no BOS token, or a special token
            cannot be kept as plain text.
    """
    prompt = str(example.prompt)
    wholes = [prompt + str(text) for text in _completions(example)]
    try:
        parts = _split(
            _encode(tokenizer, prompt, controls, ends=False),
            [_encode(tokenizer, whole, controls, ends=True) for whole in wholes],
        )
    except NotPlainTextError as error:
        raise BadPairError(example.location, SPECIAL_TOKEN, str(error)) from None
    if parts.prompt:
        return parts
    if tokenizer.bos_token_id is None:
        problem = "the tokenizer has no BOS token"
        raise BadPairError(example.location, EMPTY_PROMPT, problem)
    return parts._replace(prompt=(tokenizer.bos_token_id,))


def split_control_tokens(tokenizer: Any, text: str, *, ends: bool) -> tuple[str, str, str]:
    """Split a text into its leading BOS token, the inner text, and its trailing stop token.

    The first or last part is empty if the text has no such token.

    Args:
        tokenizer: the tokenizer.
        text: plain text.
        ends: also split off a stop token at the end, with the white space after it.
    """
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
    """Return the text of token ids in backticks, or `nothing` without ids, for error messages."""
    return f"`{tokenizer.decode(list(ids))}`".replace("\n", "\\n") if ids else "nothing"


def _join(prompt: tuple[Message, ...], completion: tuple[Message, ...]) -> list[Message]:
    """Return the messages of prompt and completion as one conversation.

    If the prompt ends with an assistant turn, the completion's first message continues that turn.
    """
    last, first = prompt[-1], completion[0]
    if last["role"] != "assistant":
        return [*prompt, *completion]
    joined = last | first | {"content": last["content"] + first["content"]}
    return [*prompt[:-1], joined, *completion[1:]]


def _is_prefix(tokenizer: Any, before: TemplateInput, whole: TemplateInput) -> bool:
    """Return whether the prompt `before` is a prefix of the conversation `whole`, as text.

    Both texts are in the chat template. If the result is True, but the token ids of the prompt
    are no prefix, a token spans the boundary of prompt and completion.
    """
    prefix, text = (
        _render(tokenizer, template_input, tokenize=False) for template_input in (before, whole)
    )
    return bool(text.startswith(prefix))


def _find_remedy(tokenizer: Any, before: TemplateInput, whole: TemplateInput) -> str:
    """Return what to do about a prompt `before` that is no prefix of the conversation `whole`."""
    other_mode = [part._replace(thinking=not before.thinking) for part in (before, whole)]
    try:
        if _is_prefix(tokenizer, *other_mode):
            if before.thinking:
                return "the template accepts such answers without thinking: leave out --thinking"
            return "the answers contain the model's thoughts: add --thinking"
    except TemplateError:  # the template refuses the other mode
        pass
    return "use a model whose template keeps the prompt"


def _boundary_error(
    tokenizer: Any, location: str, before: Ids, whole: Ids, remedy: str
) -> PromptBoundaryError:
    position = _shared_length(before, whole)
    was, became = (format_ids(tokenizer, ids[position : position + 1]) for ids in (before, whole))
    return PromptBoundaryError(
        f"{location}: the chat template changes the prompt once a reply follows (token "
        f"{position}: {was} became {became}), so the start of the reply is unknown; "
        f"{remedy}"
    )


def _split(prompt: Ids, rows: Sequence[Ids]) -> TokenizedParts:
    """Split sequences (prompt + completion) after the common prefix of all and of `prompt`.

    A token that spans the boundary of prompt and completion goes to the completions.
    """
    end = min(_shared_length(prompt, row) for row in rows)
    return TokenizedParts(prompt[:end], [row[end:] for row in rows], len(prompt) - end)


def _shared_length(first: Ids, second: Ids) -> int:
    """Return the length of the common prefix of two sequences of token ids."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _render(tokenizer: Any, template_input: TemplateInput, *, tokenize: bool) -> Any:
    messages = fit_tool_calls(tokenizer, template_input.messages)
    return call_template(tokenizer, template_input._replace(messages=messages), tokenize=tokenize)


def _encode(tokenizer: Any, text: str, controls: bool, *, ends: bool) -> Ids:
    begin, inner, end = split_control_tokens(tokenizer, text, ends=ends)
    specials = get_special_tokens(tokenizer)
    if controls or not specials.find(inner):
        return tuple(tokenizer.encode(text, add_special_tokens=not begin))
    ids = specials.encode(tokenizer, begin + specials.mark(inner) + end)
    adds_bos = tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]
    return (tokenizer.bos_token_id, *ids) if adds_bos and not begin else tuple(ids)
