"""What a request to the server may not say: what would be left undone in silence, or end it.

mlx-lm's server passes over fields that it does not know, and a value that only fails while tokens
are made ends the thread that makes them, for everyone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_dpo.preferences.schemas.messages import OURS

SEEDS = 2**64
# Fields that would change the answer, each with the values that ask for what is done anyway.
UNSERVED: Mapping[str, tuple[Any, ...]] = {
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


def wrong_with(body: Mapping[str, Any], *, vocab_size: int) -> str | None:
    """What of a request cannot be done, None where all of it can."""
    return next(_faults(body, vocab_size), None)


def _faults(body: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    for name, served in UNSERVED.items():
        if (value := body.get(name)) is not None and value not in served:
            yield f"`{name}` is not served here (found {_shown(value)}); leave it out"
    if body.get("tools") and body.get("tool_choice") == "none":
        yield "`tool_choice` none is not served here; leave `tools` out"
    if "prompt" in body and not (isinstance(body["prompt"], str) and body["prompt"]):
        yield f"`prompt` must be text, one for a request, found {_shown(body['prompt'])}"
    yield from _faults_of_messages(body.get("messages", ()))
    yield from _faults_of_choice(body, vocab_size)
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        yield f"`chat_template_kwargs` must be an object, found {_shown(given)}"
    elif taken := sorted(OURS & given.keys()):
        yield f"`chat_template_kwargs` cannot say {', '.join(taken)}"
    told = body.get("stream_options") or {}
    if not isinstance(told, dict):
        yield f"`stream_options` must be an object, found {_shown(told)}"


def _faults_of_messages(messages: Any) -> Iterator[str]:
    """Only text is read: a link to an image would be fetched, wherever it leads."""
    if not isinstance(messages, list | tuple) or not all(isinstance(m, dict) for m in messages):
        yield "`messages` must be a list of objects"
        return
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                yield f"`messages` hold a part of type {_shown(kind)}; only text is read here"
        if not isinstance(content, str | list | None):
            yield f"`content` must be text, found {_shown(content)}"


def _faults_of_choice(body: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    """Of settings of the choice, those that mlx-lm does not look at before it begins."""
    stop = body.get("stop") or []
    stops = stop if isinstance(stop, list) else [stop]
    if not all(isinstance(one, str) and one for one in stops):
        yield f"`stop` must be text or a list of texts, none of them empty, found {_shown(stop)}"
    top_k = body.get("top_k")
    if isinstance(top_k, int) and top_k >= vocab_size:
        yield f"`top_k` must be below the vocabulary of {vocab_size} tokens, found {top_k}"
    seed = body.get("seed")
    if isinstance(seed, int) and not 0 <= seed < SEEDS:
        yield f"`seed` must be from 0 to {SEEDS - 1}, found {seed}"
    bias = body.get("logit_bias")
    for token in bias if isinstance(bias, dict) else ():
        # MLX checks no bounds: a foreign id would be written into other memory.
        if not (token.isdecimal() and int(token) < vocab_size):
            yield f"`logit_bias` must name tokens from 0 to {vocab_size - 1}, found {_shown(token)}"


def _shown(value: Any) -> str:
    return repr(value)[:80]
