"""mlx-lm's OpenAI-compatible server over one set of weights: each side of it a model by name.

mlx-lm finishes what it is answering before it asks for another model, so a side can be put on then.
"""

import json
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import (
    APIHandler,
    CompletionRequest,
    ModelProvider,
    ResponseGenerator,
    get_system_fingerprint,
)

from mlx_dpo.adapters.switch import Side, Sides, evaluated
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError, reason
from mlx_dpo.generation.generate import batches_exactly
from mlx_dpo.schemas.messages import OURS

SEEDS = 2**64
# Fields that would change the answer, each with the values that ask for what is done anyway.
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
    """What of a request cannot be done, None where all of it can."""
    return next(_request_errors(body, vocab_size), None)


def _request_errors(body: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    for name, served in UNSUPPORTED_FIELDS.items():
        if (value := body.get(name)) is not None and value not in served:
            yield f"`{name}` is not served here (found {_abbreviate(value)}); leave it out"
    if body.get("tools") and body.get("tool_choice") == "none":
        yield "`tool_choice` none is not served here; leave `tools` out"
    if "prompt" in body and not (isinstance(body["prompt"], str) and body["prompt"]):
        yield f"`prompt` must be text, one for a request, found {_abbreviate(body['prompt'])}"
    yield from _message_errors(body.get("messages", ()))
    yield from _sampling_errors(body, vocab_size)
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        yield f"`chat_template_kwargs` must be an object, found {_abbreviate(given)}"
    elif taken := sorted(OURS & given.keys()):
        yield f"`chat_template_kwargs` cannot say {', '.join(taken)}"
    told = body.get("stream_options") or {}
    if not isinstance(told, dict):
        yield f"`stream_options` must be an object, found {_abbreviate(told)}"


def _message_errors(messages: Any) -> Iterator[str]:
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
                yield f"`messages` hold a part of type {_abbreviate(kind)}; only text is read here"
        if not isinstance(content, str | list | None):
            yield f"`content` must be text, found {_abbreviate(content)}"


def _sampling_errors(body: Mapping[str, Any], vocab_size: int) -> Iterator[str]:
    """Of settings of the choice, those that mlx-lm does not look at before it begins."""
    stop = body.get("stop") or []
    stops = stop if isinstance(stop, list) else [stop]
    if not all(isinstance(one, str) and one for one in stops):
        yield f"`stop` must be a non-empty text or a list of such, found {_abbreviate(stop)}"
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
            yield (
                f"`logit_bias` must name tokens from 0 to {vocab_size - 1}, "
                f"found {_abbreviate(token)}"
            )


def _abbreviate(value: Any) -> str:
    return repr(value)[:80]


DEFAULT_MODEL = "default_model"  # what mlx-lm calls the model of a request that names none
MAX_BODY_BYTES = 1 << 26  # bytes of a request's body


class RequestHandler(APIHandler):
    """mlx-lm's, that lists what is served here and answers no page that was not let in."""

    def parse_request(self) -> bool:
        """Read the head of a request; a foreign one is refused."""
        if not super().parse_request():
            return False
        if not self._is_let_in():
            self.send_error(403, "Origin or Host is not allowed")
            return False
        return True

    def _is_let_in(self) -> bool:
        """A browser sends the origin of a page, and a name that a page may have made up."""
        allowed = self.response_generator.cli_args.allowed_origins
        origin = self.headers.get("Origin")
        if origin is not None and "*" not in allowed and origin not in allowed:
            return False
        if not is_loopback(self.server.server_address[0]):
            return True
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            return False
        return is_loopback(host)

    def do_POST(self) -> None:  # noqa: N802 (http.server's name)
        """Answer a question, if there is one that can be read."""
        length = self.headers.get("Content-Length")
        if length is not None and not _is_valid_length(length):
            self._refuse(413, f"a request may have {MAX_BODY_BYTES:,} bytes, found {length[:20]!r}")
            return
        try:
            super().do_POST()
        except (UnicodeDecodeError, RecursionError) as error:
            self._refuse(400, f"the request cannot be read ({reason(error)})")

    def validate_model_parameters(self) -> None:
        """Refuse what cannot be done; ValueError says what."""
        super().validate_model_parameters()
        service = self.response_generator.model_provider.service
        if wrong := find_request_error(self.body, vocab_size=service.vocab_size):
            raise ValueError(wrong)
        if (told := self.body.get("stream_options")) is not None:
            # mlx-lm reads this field of it in any case.
            self.stream_options: dict[str, Any] = {"include_usage": False, **told}

    def handle_models_request(self) -> None:
        """List the names."""
        names = self.response_generator.model_provider.service.names
        rows = [{"id": n, "object": "model", "created": self.created} for n in names]
        self._answer(200, {"object": "list", "data": rows})

    def _refuse(self, status: int, wrong: str, *, code: str | None = None) -> None:
        error = {"message": wrong, "type": "invalid_request_error", "code": code}
        self._answer(status, {"error": error})

    def _answer(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Answer, unless something is asked for that is not here."""
        names = self.response_generator.model_provider.service.names
        wrong = None
        if self.requested_model not in (*names, DEFAULT_MODEL):
            known = ", ".join(f"`{name}`" for name in names)
            wrong = f"model `{self.requested_model}` is not served here; ask for {known}"
        elif self.adapter is not None or self.requested_draft_model != DEFAULT_MODEL:
            wrong = "`adapters` and `draft_model` are not for a request to choose here"
        if wrong is None:
            super().handle_completion(request, stop_words)
        else:
            self._refuse(404, wrong, code="model_not_found")

    def handle_chat_completions(self) -> CompletionRequest:
        """A conversation, with the system message that it was trained with if it has none."""
        request = super().handle_chat_completions()
        system = self.response_generator.model_provider.service.system
        roles = {message.get("role") for message in request.messages}
        if system is not None and not roles & {"system", "developer"}:
            request.messages.insert(0, {"role": "system", "content": system})
        return request


def is_loopback(host: str) -> bool:
    """Whether only this machine can ask there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_valid_length(length: str) -> bool:
    """Whether what `Content-Length` says can be read; less than nothing would be read for ever."""
    return length.isdecimal() and len(length) < 20 and int(length) <= MAX_BODY_BYTES


PROBE_LENGTHS = (3, 40)  # lengths of the prompts on which batching is tried
PROMPT_CACHE_SIZE = 10


@dataclass(frozen=True)
class ServedModel:
    """What is served, and how where a request does not say."""

    model: Any
    tokenizer: Any
    sides: Sides
    names: Mapping[str, Side]  # the first one is for requests that name none
    vocab_size: int  # ids at or above it must not reach the model
    sampling: Sampling
    thinking: bool = False
    system: str | None = None  # for conversations that have none
    origins: Sequence[str] = ()  # web pages that may ask; `*` is any


class SwitchingModelProvider(ModelProvider):
    """Puts on the side that a request names, where mlx-lm would load another model."""

    def __init__(self, service: ServedModel) -> None:
        super().__init__(_mlx_lm_arguments(service))
        self.service = service
        self.batches = batches_exactly(
            service.model, [[n % 7 for n in range(length)] for length in PROBE_LENGTHS]
        )
        # The server's thread could compute nothing that was begun on this one.
        evaluated(service.model)

    def load_default(self) -> None:
        """The side that is for requests that name none."""
        self.load(DEFAULT_MODEL)

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Put on the side of that name."""
        names = self.service.names
        side = names[next(iter(names)) if model_path == DEFAULT_MODEL else model_path]
        self.service.sides.put(side)
        self.model_key = (side, None, None)  # prompt caches are kept apart by it
        self.model, self.tokenizer = self.service.model, self.service.tokenizer
        self.is_batchable = self.batches
        return self.model, self.tokenizer


class SynchronizedResponseGenerator(ResponseGenerator):
    """mlx-lm's, whose thread leaves nothing running behind it."""

    def _tokenize(self, tokenizer: Any, request: CompletionRequest, args: Any) -> Any:
        found = super()._tokenize(tokenizer, request, args)
        if not found[0]:  # the model cannot begin with nothing, and the thread would end there
            raise ValueError("the prompt is empty")
        return found

    def _run_generate(self) -> None:
        super()._run_generate()
        # Work that is still under way when the thread ends would abort the program.
        mx.synchronize()
        mx.clear_streams()


class Server(ThreadingHTTPServer):
    """Bound when it is made, so that a port that is taken is known before a model is loaded."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        try:
            [(self.address_family, *_), *_] = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            super().__init__((host, port), RequestHandler)
        except OSError as error:
            raise ConfigError(
                f"{host}:{port}: cannot be listened at ({reason(error)}); choose another --port or "
                "--host"
            ) from error

    @property
    def url(self) -> str:
        """What clients are given as their base."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def answer(self, service: ServedModel) -> None:
        """Answer requests until Ctrl-C."""
        generator = SynchronizedResponseGenerator(
            SwitchingModelProvider(service), LRUPromptCache(PROMPT_CACHE_SIZE)
        )
        fingerprint = get_system_fingerprint()
        handler = partial(RequestHandler, generator, system_fingerprint=fingerprint)
        self.RequestHandlerClass = handler
        try:
            self.serve_forever()
        finally:
            self.server_close()
            generator.stop_and_join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle are no errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _mlx_lm_arguments(service: ServedModel) -> Namespace:
    """What mlx-lm's server reads of its command line."""
    sampling = service.sampling
    return Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=3,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={"enable_thinking": service.thinking},
        temp=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        decode_concurrency=32,
        prompt_concurrency=8,
        prefill_step_size=2048,
        prompt_cache_size=PROMPT_CACHE_SIZE,
        prompt_cache_bytes=None,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
        pipeline=False,
        allowed_origins=list(service.origins),
    )
