"""HTTP of the server: who is let in, what may be asked, which models there are."""

import json
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from mlx_lm.server import APIHandler, CompletionRequest

from mlx_dpo.conversation.requests import wrong_with
from mlx_dpo.errors import reason

DEFAULT = "default_model"  # what mlx-lm calls the model of a request that names none
LONGEST = 1 << 26  # bytes of a request's body


class Handler(APIHandler):
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
        if length is not None and not _is_short(length):
            self._refuse(413, f"a request may have {LONGEST:,} bytes, found {length[:20]!r}")
            return
        try:
            super().do_POST()
        except (UnicodeDecodeError, RecursionError) as error:
            self._refuse(400, f"the request cannot be read ({reason(error)})")

    def validate_model_parameters(self) -> None:
        """Refuse what cannot be done; ValueError says what."""
        super().validate_model_parameters()
        service = self.response_generator.model_provider.service
        if wrong := wrong_with(self.body, vocab_size=service.vocab_size):
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
        if self.requested_model not in (*names, DEFAULT):
            known = ", ".join(f"`{name}`" for name in names)
            wrong = f"model `{self.requested_model}` is not served here; ask for {known}"
        elif self.adapter is not None or self.requested_draft_model != DEFAULT:
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


def _is_short(length: str) -> bool:
    """Whether what `Content-Length` says can be read; less than nothing would be read for ever."""
    return length.isdecimal() and len(length) < 20 and int(length) <= LONGEST
