"""Checks of OpenAI API requests before mlx-lm's server handles them.

mlx-lm's server ignores fields that it does not implement, and a few values end its thread.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import RESERVED_TEMPLATE_KWARGS
from mlx_dpo.schemas.tool_calls import has_invalid_arguments, normalize_tool_calls

SEED_LIMIT = 2**64
# Fields that would change the answer, each with the values that have no effect.
UNSUPPORTED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": (),
    "reasoning_effort": (),
}


def find_request_error(body: Mapping[str, Any], *, vocab_size: int) -> str | None:
    """Return the first error in the body of a request, or None if the request can be served."""
    return next(_request_errors(body, vocab_size), None)


def _request_errors(body: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    for name, allowed in UNSUPPORTED_FIELDS.items():
        if (value := body.get(name)) is not None and value not in allowed:
            yield f"`{name}` is not supported here (found {_abbreviate(value)}); leave it out"
    if body.get("tools") and body.get("tool_choice") == "none":
        yield "`tool_choice` none is not supported here; leave `tools` out"
    if "prompt" in body and not (isinstance(body["prompt"], str) and body["prompt"]):
        yield f"`prompt` must be one non-empty text, found {_abbreviate(body['prompt'])}"
    yield from _message_errors(body.get("messages", ()))
    yield from _sampling_errors(body, vocab_size)
    template_values = body.get("chat_template_kwargs") or {}
    if not isinstance(template_values, dict):
        yield f"`chat_template_kwargs` must be an object, found {_abbreviate(template_values)}"
    elif reserved := sorted(RESERVED_TEMPLATE_KWARGS & template_values.keys()):
        yield f"`chat_template_kwargs` cannot set {', '.join(reserved)}"
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, dict):
        yield f"`stream_options` must be an object, found {_abbreviate(stream_options)}"


def _message_errors(messages: Any) -> Iterator[str]:
    """Yield the errors in the `messages` of a chat request, which may contain only text."""
    if not isinstance(messages, list | tuple) or not all(isinstance(m, dict) for m in messages):
        yield "`messages` must be a list of objects"
        return
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                yield f"`messages` contain a part of type {_abbreviate(kind)}; only text is read"
        if not isinstance(content, str | list | None):
            yield f"`content` must be text, found {_abbreviate(content)}"
    yield from _tool_call_errors(messages)


def _tool_call_errors(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for index, message in enumerate(messages):
        where = f"`messages[{index}]`"
        try:
            if has_invalid_arguments(normalize_tool_calls(message, where)):
                yield f"{where} has a tool call whose `arguments` are no JSON object"
        except DataError as error:
            yield str(error)


def _sampling_errors(body: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    """Yield the errors in the sampling settings of a request that mlx-lm does not find itself."""
    stop = body.get("stop") or []
    stops = stop if isinstance(stop, list) else [stop]
    if not all(isinstance(text, str) and text for text in stops):
        yield f"`stop` must be a non-empty text or a list of such, found {_abbreviate(stop)}"
    top_k = body.get("top_k")
    if isinstance(top_k, int) and top_k >= vocab_size:
        yield f"`top_k` must be below the vocabulary size of {vocab_size}, found {top_k}"
    seed = body.get("seed")
    if isinstance(seed, int) and not 0 <= seed < SEED_LIMIT:
        yield f"`seed` must be from 0 to {SEED_LIMIT - 1}, found {seed}"
    bias = body.get("logit_bias")
    for token in bias if isinstance(bias, dict) else ():
        # MLX checks no bounds: an id beyond the vocabulary would write into other memory.
        if not (token.isdecimal() and int(token) < vocab_size):
            yield (
                f"`logit_bias` must name tokens from 0 to {vocab_size - 1}, "
                f"found {_abbreviate(token)}"
            )


def _abbreviate(value: Any) -> str:
    return repr(value)[:80]
