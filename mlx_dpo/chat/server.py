"""mlx-lm's OpenAI-compatible server for the base and the aligned model on one set of weights.

mlx-lm finishes the requests in progress before it loads another model. Instead of loading one,
this server then switches the adapters on or off.
"""

import json
import socket
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
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

from mlx_dpo.adapters.switch import AdapterState, AdapterSwitch, evaluate_arrays
from mlx_dpo.chat.requests import find_request_error
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.templates.tool_calls import fit_tool_calls
from mlx_dpo.errors import ConfigError, reason
from mlx_dpo.generation.batch import is_batching_exact
from mlx_dpo.schemas.tool_calls import normalize_tool_calls
from mlx_dpo.types import Message

DEFAULT_MODEL = "default_model"  # mlx-lm's name for the model of a request that names none
MAX_BODY_BYTES = 1 << 26
PROBE_LENGTHS = (3, 40)  # prompt lengths in tokens on which exact batching is checked
PROMPT_CACHE_SIZE = 10


@dataclass(frozen=True)
class ServedModel:
    """A model to serve, the names by which clients request it, and default request settings."""

    model: Any
    tokenizer: Any
    switch: AdapterSwitch
    names: Mapping[str, AdapterState]  # the first entry serves requests that name no model
    vocab_size: int  # larger token ids must not reach the model
    sampling: Sampling
    thinking: bool = False
    system: str | None = None  # for conversations without a system message
    origins: Sequence[str] = ()  # origins of web pages that may send requests; `*` means any


class SwitchingModelProvider(ModelProvider):
    """mlx-lm's model provider, which here switches adapters instead of loading another model."""

    def __init__(self, served: ServedModel) -> None:
        super().__init__(_mlx_lm_arguments(served))
        self.served = served
        self.batches = is_batching_exact(
            served.model, [[n % 7 for n in range(length)] for length in PROBE_LENGTHS]
        )
        # The server's thread cannot evaluate arrays whose computation began on this thread.
        evaluate_arrays(served.model)

    def load_default(self) -> None:
        """Switch to the default model, which answers requests that name no model."""
        self.load(DEFAULT_MODEL)

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Switch the adapters for the served name `model_path`; return model and tokenizer."""
        names = self.served.names
        adapter_state = names[next(iter(names)) if model_path == DEFAULT_MODEL else model_path]
        self.served.switch.activate(adapter_state)
        self.model_key = (adapter_state, None, None)  # mlx-lm keeps one prompt cache per key
        self.model, self.tokenizer = self.served.model, self.served.tokenizer
        self.is_batchable = self.batches
        return self.model, self.tokenizer


class TemplateTokenizer:
    """A tokenizer that gives tool calls to its chat template as training does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: Sequence[Message], **kwargs: Any) -> Any:
        """Return the text or the token ids of a conversation in the chat template."""
        fitted = fit_tool_calls(self._tokenizer, messages)
        return self._tokenizer.apply_chat_template(fitted, **kwargs)


class SynchronizedResponseGenerator(ResponseGenerator):
    """mlx-lm's response generator, changed to finish all computations before its thread ends."""

    def _tokenize(self, tokenizer: Any, request: CompletionRequest, args: Any) -> Any:
        tokenized = super()._tokenize(TemplateTokenizer(tokenizer), request, args)
        if not tokenized[0]:  # the model fails on an empty prompt, which would end the thread
            raise ValueError("the prompt is empty")
        return tokenized

    def _run_generate(self) -> None:
        super()._run_generate()
        # A computation still running when the thread ends would abort the program.
        mx.synchronize()
        mx.clear_streams()


class RequestHandler(APIHandler):
    """mlx-lm's HTTP handler, limited to the served model names and to allowed hosts and origins."""

    def parse_request(self) -> bool:
        """Read the request line and headers; answer 403 if the host or origin is not allowed."""
        if not super().parse_request():
            return False
        if not self._is_allowed():
            self.send_error(403, "Origin or Host is not allowed")
            return False
        return True

    def _is_allowed(self) -> bool:
        """Return whether the `Origin` and `Host` headers of the request are allowed.

        A browser sends the origin of the page. A page may also reach this machine through a host
        name of its own (DNS rebinding), so a loopback server accepts only loopback host names.
        """
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
        """Answer a completion request; send an error if its body is too long or unreadable."""
        length = self.headers.get("Content-Length")
        if length is not None and not _is_valid_length(length):
            self._send_json_error(
                413, f"a request may have {MAX_BODY_BYTES:,} bytes, found {length[:20]!r}"
            )
            return
        try:
            super().do_POST()
        except (UnicodeDecodeError, RecursionError) as error:
            self._send_json_error(400, f"the request cannot be read ({reason(error)})")

    def validate_model_parameters(self) -> None:
        """Raise `ValueError` if mlx-lm or mlx-dpo finds an error in the request."""
        super().validate_model_parameters()
        served = self.response_generator.model_provider.served
        if error := find_request_error(self.body, vocab_size=served.vocab_size):
            raise ValueError(error)
        if (options := self.body.get("stream_options")) is not None:
            # mlx-lm reads `include_usage` without checking that it is there.
            self.stream_options: dict[str, Any] = {"include_usage": False, **options}

    def handle_models_request(self) -> None:
        """Send the names of the served models as JSON."""
        names = self.response_generator.model_provider.served.names
        rows = [{"id": n, "object": "model", "created": self.created} for n in names]
        self._send_json(200, {"object": "list", "data": rows})

    def _send_json_error(self, status: int, message: str, *, code: str | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "code": code}
        self._send_json(status, {"error": error})

    def _send_json(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Generate a completion; send 404 if the requested model or adapter is not served."""
        names = self.response_generator.model_provider.served.names
        error = None
        if self.requested_model not in (*names, DEFAULT_MODEL):
            known = ", ".join(f"`{name}`" for name in names)
            error = f"model `{self.requested_model}` is not served here; request {known}"
        elif self.adapter is not None or self.requested_draft_model != DEFAULT_MODEL:
            error = "a request cannot choose `adapters` or `draft_model` here"
        if error is None:
            super().handle_completion(request, stop_words)
        else:
            self._send_json_error(404, error, code="model_not_found")

    def handle_chat_completions(self) -> CompletionRequest:
        """Return the chat request, with the default system message added if it has none."""
        request = super().handle_chat_completions()
        request.messages = [normalize_tool_calls(message, "") for message in request.messages]
        system = self.response_generator.model_provider.served.system
        roles = {message.get("role") for message in request.messages}
        if system is not None and not roles & {"system", "developer"}:
            request.messages.insert(0, {"role": "system", "content": system})
        return request


def is_loopback(host: str) -> bool:
    """Return whether `host` is a loopback address or name, which only this machine can reach."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_valid_length(length: str) -> bool:
    """Return whether a `Content-Length` is a number from 0 to `MAX_BODY_BYTES`.

    Reading a body of negative length would never end.
    """
    return length.isdecimal() and len(length) < 20 and int(length) <= MAX_BODY_BYTES


class Server(ThreadingHTTPServer):
    """The HTTP server. Creating it opens the port, so a port in use fails before a model is loaded.

    Raises:
        ConfigError: the server cannot listen at this host and port.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        try:
            [(self.address_family, *_), *_] = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            super().__init__((host, port), RequestHandler)
        except OSError as error:
            raise ConfigError(
                f"{host}:{port}: cannot listen here ({reason(error)}); choose another --port or "
                "--host"
            ) from error

    @property
    def url(self) -> str:
        """URL of the API for clients; it ends in `/v1`."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def serve(self, served: ServedModel) -> None:
        """Serve the model until Ctrl-C is pressed."""
        provider = SwitchingModelProvider(served)
        generator = SynchronizedResponseGenerator(provider, LRUPromptCache(PROMPT_CACHE_SIZE))
        fingerprint = get_system_fingerprint()
        handler = partial(RequestHandler, generator, system_fingerprint=fingerprint)
        self.RequestHandlerClass = handler
        try:
            self.serve_forever()
        finally:
            self.server_close()
            generator.stop_and_join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error of a request on stderr, unless the client has only disconnected early."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _mlx_lm_arguments(served: ServedModel) -> Namespace:
    """Return the settings of the served model as arguments of mlx-lm's server."""
    sampling = served.sampling
    return Namespace(
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=3,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={"enable_thinking": served.thinking},
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
        allowed_origins=list(served.origins),
    )
