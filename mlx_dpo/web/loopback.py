"""An HTTP server for a page that only the person at this machine may see.

It listens on loopback, and every request needs the token in the page's address, a loopback host
name and no foreign origin.
"""

import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs

from mlx_dpo.errors import ConfigError
from mlx_dpo.web.json_body import linger

LOOPBACK = "127.0.0.1"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class LoopbackServer(ThreadingHTTPServer):
    """An HTTP server that is reachable only from this machine, and only with its token.

    Every request is handled in a thread of its own.
    """

    daemon_threads = True

    def __init__(self, handler: type["PageHandler"], port: int = 0) -> None:
        """Start listening on `port`; port 0 picks a free port.

        Raises:
            ConfigError: the port is in use.
        """
        self.token = secrets.token_urlsafe(24)
        self.has_ended = Event()  # no more requests will be answered
        try:
            super().__init__((LOOPBACK, port), handler)
        except OSError as error:
            raise ConfigError(f"`port` {port}: {error.strerror}; choose another one") from error

    @property
    def url(self) -> str:
        """URL of the page with the secret token; anyone on this machine who has it can use it."""
        return f"http://{LOOPBACK}:{self.server_port}/?token={self.token}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve HTTP in a background thread inside the `with` block."""
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield
        finally:
            self.has_ended.set()
            self.shutdown()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error of a request, unless the browser has only closed the connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class PageHandler(BaseHTTPRequestHandler, ABC):
    """HTTP handler of a page; a subclass answers the allowed requests.

    The page itself is requested with the token in its address. Whatever the page requests must
    carry the token in the header `X-Token`, which a page of another origin cannot set.
    """

    server: LoopbackServer
    timeout = 30  # browsers open connections that they may never use

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        fields = parse_qs(query)
        header = self.headers.get("X-Token")
        if not self._is_allowed(header or fields.get("token", [""])[0]):
            return
        if path == "/":
            nonce = secrets.token_urlsafe(12)
            policy = CONTENT_SECURITY_POLICY.format(nonce=nonce)
            self.send_text(200, "text/html", self.page(nonce), policy)
        elif header is None or not self.answer_get(path, fields):
            self._send_not_found()

    def do_POST(self) -> None:
        if not self._is_allowed(self.headers.get("X-Token") or ""):
            return
        if not self.answer_post(self.path.partition("?")[0]):
            self._send_not_found()

    @abstractmethod
    def page(self, nonce: str) -> str:
        """Return the HTML of the page, whose styles and scripts carry the nonce."""

    def answer_get(self, path: str, query: dict[str, list[str]]) -> bool:
        """Answer a GET request of the page; return False if there is nothing at the path."""
        return False

    def answer_post(self, path: str) -> bool:
        """Answer a POST request of the page; return False if there is nothing at the path."""
        return False

    def _is_allowed(self, token: str) -> bool:
        """Return whether host, origin and token of the request are allowed; if not, send 403."""
        hosts = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in hosts:  # a foreign name that resolves to loopback
            self.send_text(403, "text/plain", "this page is only for the machine it runs on")
        elif origin is not None and origin.removeprefix("http://") not in hosts:
            self.send_text(403, "text/plain", "requested from another page")
        elif not compare_digest(token.encode(), self.server.token.encode()):
            text = "the token is missing or wrong; use the whole address"
            self.send_text(403, "text/plain", text)
        else:
            return True
        return False

    def _send_not_found(self) -> None:
        self.send_text(404, "text/plain", "no such page")

    def send_text(
        self, code: int, kind: str, text: str, policy: str = "default-src 'none'"
    ) -> None:
        """Send a reply that no other page may read and no browser may store."""
        body = text.encode()
        self.send_response(code)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", policy),
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def finish(self) -> None:
        """Send the reply, and let the browser read it before the connection is closed."""
        super().finish()
        linger(self.connection)

    def version_string(self) -> str:
        """Return the program's name for the HTTP header `Server`."""
        return "mlx-dpo"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: HTTP log lines would scroll the page's URL off the terminal."""
