"""mlx-lm's OpenAI-compatible server for the base and the aligned model on one set of weights.

mlx-lm finishes the requests in progress before it loads another model. Instead of loading one,
this server then switches the adapters on or off.
"""

import json
import socket
import sys
from collections.abc import Mapping
from email.message import Message
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from io import BytesIO
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm.server import APIHandler, CompletionRequest, get_system_fingerprint

from mlx_dpo.chat.field_types import shorten
from mlx_dpo.chat.request_messages import roles
from mlx_dpo.chat.requests import (
    CHAT,
    DEFAULT_MODEL,
    FEEDBACK,
    TEXT,
    RequestError,
    parse_request,
)
from mlx_dpo.chat.response_generator import (
    FaultTolerantResponseGenerator,
    GenerationFailed,
    print_failure,
)
from mlx_dpo.chat.served_feedback import ROW_FIELDS, ServedAnswer
from mlx_dpo.chat.served_model import ServedModel, SwitchingModelProvider
from mlx_dpo.errors import ConfigError, DataError, reason
from mlx_dpo.web.json_body import BodyError, linger, read_json_object

MAX_BODY_BYTES = 1 << 26
MODELS_PATH, HEALTH_PATH = "/v1/models", "/health"
GET_PATHS = (MODELS_PATH, HEALTH_PATH)
POST_PATHS = {CHAT: CHAT, "/chat/completions": CHAT, TEXT: TEXT, FEEDBACK: FEEDBACK}
MODEL_NOT_FOUND = "model_not_found"  # OpenAI's code
SAMPLING_SETTINGS = (  # of a request, stored with the judgement of its answer
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed",
)  # fmt: skip


class RequestHandler(APIHandler):
    """mlx-lm's HTTP handler, limited to the served model names and to allowed hosts and origins.

    Errors are objects in the form of OpenAI's API. A request costs the server at most this request.
    """

    timeout = 60  # seconds without a byte from the client

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
        """Answer a completion request; send an error object if it cannot be served."""
        try:
            path = POST_PATHS.get(self._path)
            if path is None:
                raise self._unknown_path()
            body = read_json_object(self, limit=MAX_BODY_BYTES)
            request = parse_request(body, path, vocab_size=self._served.vocab_size)
            if path == FEEDBACK:
                self._handle_feedback(request)
                return
            self._check_model(request)
        except BodyError as error:
            self._send_json_error(error.status, str(error))
        except RequestError as error:
            self._send_json_error(error.status, str(error), param=error.param, code=error.code)
        else:
            self._handle_again(path, request)

    def _handle_again(self, path: str, request: Mapping[str, Any]) -> None:
        """Let mlx-lm handle the checked request, which it reads from the body again."""
        body = json.dumps(request).encode()
        self.path, self.rfile = path, BytesIO(body)
        self.headers.replace_header("Content-Length", str(len(body)))
        super().do_POST()

    def _handle_feedback(self, request: Mapping[str, Any]) -> None:
        """Write the judgement of an answer to the file of feedback, and send what was done.

        Raises:
            RequestError: the server has no such file, or does not know the answer.
        """
        feedback = self._served.feedback
        if feedback is None:
            raise RequestError(
                "feedback is not recorded; start the server with --feedback FILE",
                status=HTTPStatus.NOT_IMPLEMENTED,
            )
        try:
            self._send_json(200, feedback.write(request))
        except DataError as error:  # the disk; its path is nothing for a client
            print_failure(str(error), error)
            raise RequestError("the feedback could not be written", status=500) from error

    @property
    def _served(self) -> ServedModel:
        return self.response_generator.model_provider.served

    @property
    def _path(self) -> str:
        """Path of the request without query and final slash."""
        return self.path.partition("?")[0].rstrip("/") or "/"

    def _unknown_path(self) -> RequestError:
        """Return the error for a path that the method of this request does not have."""
        is_model = self._path.startswith(f"{MODELS_PATH}/")
        methods = [
            method
            for method, paths in (("GET", GET_PATHS), ("POST", POST_PATHS))
            if self._path in paths or (is_model and method == "GET")
        ]
        if not methods or self.command in methods:
            return RequestError("no such path; use /v1/chat/completions", status=404)
        return RequestError(f"{self.command} is not possible; use {methods[0]}", status=405)

    def do_GET(self) -> None:  # noqa: N802 (http.server's name)
        """Send the served models, one of them, or the server's health."""
        path = self._path
        if path == HEALTH_PATH:
            self.handle_health_check()
        elif path == MODELS_PATH:
            self.handle_models_request()
        elif path.startswith(f"{MODELS_PATH}/"):
            self._send_model(unquote(path.removeprefix(f"{MODELS_PATH}/")))
        else:
            error = self._unknown_path()
            self._send_json_error(error.status, str(error))

    def handle_models_request(self) -> None:
        """Send the names of the served models as JSON."""
        rows = [self._model_row(name) for name in self._served.names]
        self._send_json(200, {"object": "list", "data": rows})

    def _send_model(self, name: str) -> None:
        if name in self._served.names:
            self._send_json(200, self._model_row(name))
        else:
            error = self._unknown_model(name)
            self._send_json_error(error.status, str(error), param=error.param, code=error.code)

    def _model_row(self, name: str) -> dict[str, Any]:
        row = {"id": name, "object": "model", "created": self.created, "owned_by": "mlx-dpo"}
        return row | {"digest": self._served.digests[name]} if self._served.digests else row

    def _check_model(self, request: Mapping[str, Any]) -> None:
        """Raise `RequestError` if the requested model or adapter is not served."""
        name = request.get("model", DEFAULT_MODEL)
        if name not in (*self._served.names, DEFAULT_MODEL):
            raise self._unknown_model(name)
        for field in ("adapters", "draft_model"):
            if request.get(field, DEFAULT_MODEL) != DEFAULT_MODEL or field == "adapters" in request:
                raise RequestError(
                    "a request cannot choose `adapters` or `draft_model` here",
                    field,
                    status=404,
                    code=MODEL_NOT_FOUND,
                )

    def _unknown_model(self, name: str) -> RequestError:
        known = ", ".join(f"`{name}`" for name in self._served.names)
        return RequestError(
            f"model `{shorten(name)[1:-1]}` is not served here; request {known}",
            "model",
            status=404,
            code=MODEL_NOT_FOUND,
        )

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error of the HTTP protocol, such as an unknown method, as a JSON object."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            error = self._unknown_path()
            code, message = error.status, str(error)
        if not hasattr(self, "headers"):  # an unreadable request line
            self.headers = Message()
        self._send_json_error(int(code), message or HTTPStatus(code).phrase)

    def _send_json_error(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        self._send_json(status, error_object(status, message, param=param, code=code))

    def _send_json(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self._set_completion_headers(status)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "POST" if self._path in POST_PATHS else "GET")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def validate_model_parameters(self) -> None:
        """Convert the keys of `logit_bias` to token ids; `parse_request` has checked all fields.

        mlx-lm's own checks refuse `top_logprobs` above 11.
        """
        biases = self.body.get("logit_bias") or {}
        self.logit_bias = {int(token): bias for token, bias in biases.items()}

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._is_streaming = True

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Generate a completion; if this fails, send an error and continue with other requests."""
        self._is_streaming = False
        self._request, self._answer, self._calls_tools = request, "", False
        try:
            super().handle_completion(request, stop_words)
        except (ConnectionError, TimeoutError):
            raise  # the client has left
        except GenerationFailed as failure:
            self._send_failure(failure.cause)
        except Exception as error:
            self._send_failure(error)

    def generate_response(
        self, text: str, finish_reason: str | None, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return a part of the answer as JSON; remember the answer before its last part is sent."""
        response: dict[str, Any] = super().generate_response(text, finish_reason, *args, **kwargs)
        self._answer += text
        self._calls_tools |= bool(kwargs.get("tool_calls"))
        if finish_reason is not None:
            self._remember_answer(is_cut=finish_reason == "length")
        return response

    def _remember_answer(self, *, is_cut: bool) -> None:
        """Remember a chat answer, so that it can be judged by the id of its completion.

        A continued text is not remembered: mlx-lm removes the space between it and its prompt.
        """
        served, request = self._served, self._request
        if served.feedback is None or request.request_type != "chat":
            return
        name = self.requested_model
        state = served.names[next(iter(served.names)) if name == DEFAULT_MODEL else name]
        sampling = {
            setting: getattr(self, setting)
            for setting in SAMPLING_SETTINGS
            if getattr(self, setting) is not None
        }
        fields = {name: self.body[name] for name in ROW_FIELDS if self.body.get(name)}
        answer = ServedAnswer(
            tuple(request.messages), self._answer, state, sampling, fields, is_cut=is_cut,
            calls_tools=self._calls_tools,
        )  # fmt: skip
        served.feedback.answers.add(self.request_id, answer)

    def _send_failure(self, error: Exception) -> None:
        """Send why a request failed; in a stream that has begun, as its last event."""
        if isinstance(error, RequestError):
            status, message, param, code = error.status, str(error), error.param, error.code
        else:
            status, param, code = 500, None, None
            message = f"generation failed ({type(error).__name__}: {reason(error)})"
            print_failure(message, error)
        body = error_object(status, message, param=param, code=code)
        if self._is_streaming:
            self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
            return
        self._headers_buffer: list[bytes] = []  # mlx-lm has begun a reply with status 200
        self._send_json(status, body)

    def finish(self) -> None:
        """Send the reply, and let the client read it before the connection is closed."""
        super().finish()
        linger(self.connection)

    def handle_chat_completions(self) -> CompletionRequest:
        """Return the chat request, with the default system message added if it has none."""
        request = super().handle_chat_completions()
        system = self.response_generator.model_provider.served.system
        if system is not None and not roles(request.messages) & {"system", "developer"}:
            request.messages.insert(0, {"role": "system", "content": system})
        return request


def is_loopback(host: str) -> bool:
    """Return whether `host` is a loopback address or name, which only this machine can reach."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error in the form of OpenAI's API."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Server(ThreadingHTTPServer):
    """The HTTP server. Creating it opens the port, so a port in use fails before a model is loaded.

    Raises:
        ConfigError: the server cannot listen at this host and port.
    """

    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted

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
        generator = FaultTolerantResponseGenerator(
            provider, vocab_size=served.vocab_size, context=served.context
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
        """Print the error of a request on one line, unless the client has only left early."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):
            print_failure(f"{type(error).__name__}: {reason(error)}", error)
