"""The fields of a request to the OpenAI-compatible server: name, type, bounds and effect.

mlx-lm's server ignores fields that it does not implement, and a few values end its thread. Here
each field is either in the table or refused, and null is as if the field were absent.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mlx_dpo.chat.field_types import (
    Boolean,
    Choice,
    FieldType,
    Integer,
    Number,
    Object,
    Options,
    String,
    StringMap,
    Strings,
    TokenBias,
    Word,
    check_encodable,
    shorten,
)
from mlx_dpo.chat.request_messages import Messages, Tools
from mlx_dpo.errors import DPOError
from mlx_dpo.schemas.messages import RESERVED_TEMPLATE_KWARGS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FEEDBACK = "/v1/feedback"
MAX_SEED = 2**64 - 1
MAX_COUNT = 2**31 - 1  # of tokens; MLX counts positions with 32 bits
MAX_TEXT = 1 << 26  # characters; the size of the request is bounded as well
MAX_STOPS, MAX_STOP_LENGTH = 32, 1_000
MAX_ID, MAX_COMMENT = 200, 10_000  # characters
GOOD, BAD = "good", "bad"
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
# Below these, float32 cannot tell the setting from greedy decoding.
MIN_TEMPERATURE, MIN_TOP_P = 1e-30, 1e-7
# mlx-lm's own defaults: the model and the draft model of a request that names none.
DEFAULT_MODEL = "default_model"


class RequestError(DPOError):
    """A request cannot be served as it is.

    `param` is the name of the wrong field, `code` OpenAI's name of the error, and `status` the
    HTTP status of the reply.
    """

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Field:
    """A field of a request.

    `effect` says what the field does; a field without effect is accepted because OpenAI's clients
    send it and it changes nothing of the answer.
    """

    name: str
    type: FieldType
    effect: str = ""
    paths: tuple[str, ...] = (CHAT, TEXT)


def _chat(name: str, type: FieldType, effect: str = "") -> Field:
    return Field(name, type, effect, (CHAT,))


def _text(name: str, type: FieldType, effect: str = "") -> Field:
    return Field(name, type, effect, (TEXT,))


@cache
def request_fields(vocab_size: int) -> Mapping[str, Field]:
    """Return the fields of requests for a completion by name, for `vocab_size` tokens."""
    fields = (*_content_fields(), *_sampling_fields(vocab_size), *_fields_without_effect())
    return {field.name: field for field in fields}


@cache
def feedback_fields() -> Mapping[str, Field]:
    """Return the fields of a judgement of an answer by name."""
    fields = (
        Field("id", String(MAX_ID, minimum=1), "`id` of the completion", (FEEDBACK,)),
        Field("rating", Word((GOOD, BAD)), "the judgement", (FEEDBACK,)),
        Field("edited", String(MAX_TEXT, minimum=1), "a better answer", (FEEDBACK,)),
        Field("comment", String(MAX_COMMENT), "stored with the rows", (FEEDBACK,)),
    )
    return {field.name: field for field in fields}


def _content_fields() -> tuple[Field, ...]:
    return (
        Field("model", String(1_000, minimum=1), "`base` or `aligned`"),
        _chat("messages", Messages(), "the conversation"),
        _text("prompt", String(MAX_TEXT, minimum=1), "the text to continue"),
        _chat("tools", Tools(), "given to the chat template"),
        _chat("chat_template_kwargs", Object(), "given to the chat template"),
        _chat("role_mapping", StringMap(), "turns of a model without a chat template"),
        Field("stream", Boolean(), "send the answer in pieces"),
        Field(
            "stream_options",
            Options({"include_usage": Boolean(), "include_obfuscation": Boolean()}),
            "end a stream with the token counts",
        ),
    )


def _sampling_fields(vocab_size: int) -> tuple[Field, ...]:
    penalty, count = Number(-100, 100), Integer(1, MAX_COUNT)
    share = Number(0, 1)
    return (
        Field("max_tokens", count, "maximum length of the answer"),
        Field("max_completion_tokens", count, "maximum length of the answer"),
        Field("temperature", Number(0, 100), "0 = greedy"),
        Field("top_p", share, "nucleus sampling"),
        Field("top_k", Integer(0, vocab_size - 1), "0 = all tokens"),
        Field("min_p", share, "share of the top probability"),
        Field("xtc_probability", share, "exclude top choices"),
        Field("xtc_threshold", Number(0, 0.5), "exclude top choices"),
        Field("repetition_penalty", Number(0, 100), "0 and 1 = off"),
        Field("repetition_context_size", count, "tokens that the penalty looks back"),
        Field("presence_penalty", penalty, "0 = off"),
        Field("presence_context_size", count, "tokens that the penalty looks back"),
        Field("frequency_penalty", penalty, "0 = off"),
        Field("frequency_context_size", count, "tokens that the penalty looks back"),
        Field("logit_bias", TokenBias(vocab_size, Number(-100, 100)), "added to logits"),
        Field("logprobs", Boolean(), "send the log-prob of each token; not with `stream`"),
        Field(
            "top_logprobs",
            Integer(0, min(MAX_TOP_LOGPROBS, vocab_size)),
            "send the most likely tokens; not with `stream`",
        ),
        Field("seed", Integer(0, MAX_SEED), "seed of this request's sampling"),
        Field("stop", Strings(String(MAX_STOP_LENGTH, minimum=1), MAX_STOPS), "end the answer"),
    )


def _fields_without_effect() -> tuple[Field, ...]:
    label = String(10_000)
    return (
        # Only the values that change nothing are accepted.
        Field("n", Choice((1,))),
        _text("best_of", Choice((1,))),
        _text("echo", Choice((False,))),
        _text("suffix", Choice(("",))),
        _chat("response_format", Choice(({"type": "text"},))),
        _chat("tool_choice", Choice(("auto", "none"))),
        _chat("parallel_tool_calls", Choice((True,))),
        _chat("functions", Choice(([],))),
        _chat("function_call", Choice(("auto", "none"))),
        _chat("modalities", Choice((["text"],))),
        _chat("verbosity", Choice(("medium",))),
        _chat("reasoning_effort", Choice(())),
        _chat("audio", Choice(())),
        _chat("web_search_options", Choice(())),
        # mlx-lm's, which this server refuses with the names of its models.
        Field("adapters", String(10_000)),
        Field("draft_model", String(10_000)),
        Field("num_draft_tokens", Integer(0, MAX_COUNT)),
        # Accounts, storage, billing and caches of OpenAI's own service.
        Field("user", label),
        Field("safety_identifier", label),
        Field("prompt_cache_key", label),
        Field("prompt_cache_retention", label),
        Field("service_tier", label),
        Field("metadata", StringMap()),
        Field("store", Boolean()),
        _chat("prediction", Object()),
    )


def parse_request(body: Mapping[str, Any], path: str, *, vocab_size: int) -> dict[str, Any]:
    """Return the fields of a request to `path`, checked, in mlx-lm's form and without nulls.

    Raises:
        RequestError: a field is unknown, of another type, out of bounds, missing or unsupported.
    """
    fields = feedback_fields() if path == FEEDBACK else request_fields(vocab_size)
    request = {}
    for name, value in body.items():
        field = fields.get(name)
        try:
            check_encodable([name, value])
            if field is None or path not in field.paths:
                raise ValueError(_unknown(name, path, fields))
            if value is not None:
                request[name] = field.type.parse(value)
        except ValueError as error:
            shown = name.encode("ascii", "backslashreplace").decode()[:80]
            raise RequestError(f"`{shown}` {error}", shown) from None
    if path == FEEDBACK:
        _check_feedback(request)
        return request
    _check_combinations(request, path)
    return _in_mlx_lm_form(request)


def _unknown(name: str, path: str, fields: Mapping[str, Field]) -> str:
    if name in fields:
        return f"has no effect on {path}; leave it out"
    known = [field.name for field in fields.values() if path in field.paths]
    close = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else "leave it out"
    return f"is not a field of {path}; {hint}"


def _check_combinations(request: Mapping[str, Any], path: str) -> None:
    """Raise `RequestError` if a field is missing or contradicts another."""
    required = "messages" if path == CHAT else "prompt"
    if required not in request:
        raise RequestError(f"`{required}` is missing", required)
    if request.get("tools") and request.get("tool_choice") == "none":
        raise RequestError(
            "`tool_choice` none is not supported here; leave `tools` out", "tool_choice"
        )
    for name in ("logprobs", "top_logprobs"):
        if request.get("stream") and request.get(name):
            raise RequestError(f"`{name}` is not supported with `stream`; leave it out", name)
    kwargs = request.get("chat_template_kwargs", {})
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
        raise RequestError(
            f"`chat_template_kwargs` cannot set {', '.join(reserved)}", "chat_template_kwargs"
        )
    if not isinstance(kwargs.get("enable_thinking", True), bool):
        raise RequestError(
            "`chat_template_kwargs` is wrong: `enable_thinking` must be true or false, "
            f"found {shorten(kwargs['enable_thinking'])}",
            "chat_template_kwargs",
        )


def _check_feedback(request: Mapping[str, Any]) -> None:
    """Raise `RequestError` unless the request names an answer and judges it in one way."""
    if "id" not in request:
        raise RequestError("`id` is missing; it is the `id` of the completion", "id")
    if "rating" not in request and "edited" not in request:
        raise RequestError("`rating` is missing; give it, or a better answer as `edited`", "rating")
    if "rating" in request and "edited" in request:
        raise RequestError("`rating` has no effect with `edited`; leave one of them out", "rating")
    if not request.get("edited", "x").strip():
        raise RequestError("`edited` is empty; give the text of a better answer", "edited")


def _in_mlx_lm_form(request: dict[str, Any]) -> dict[str, Any]:
    if "max_completion_tokens" in request:
        request["max_tokens"] = request.pop("max_completion_tokens")
    if request.get("top_p", 1) < MIN_TOP_P or 0 < request.get("temperature", 1) < MIN_TEMPERATURE:
        request |= {"temperature": 0.0, "top_p": 1.0}  # mlx-lm reads a `top_p` of 0 as no limit
    if "stream_options" in request:  # mlx-lm reads `include_usage` unchecked
        request["stream_options"] = {"include_usage": False, **request["stream_options"]}
    return request
