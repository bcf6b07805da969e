"""The page on which a person picks: what it shows, and what its keys do."""

import json
import secrets
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from queue import Queue
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mlx_dpo.collect.session import SKIPPED, TIE, RankingSession
from mlx_dpo.errors import ConfigError, DataError

LOOPBACK = "127.0.0.1"
MAX_BODY_BYTES = 1_000_000  # bytes of a request's body
REPLY_TIMEOUT = 600.0  # seconds that sampling may take
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True)
class PageRequest:
    """Something the page asks: a command, or its state where there is none."""

    command: dict[str, Any] | None
    reply: Future[dict[str, Any]] = field(default_factory=Future)
    answered: Event = field(default_factory=Event)  # the reply is on its way, or nobody waits


class LoopbackServer(ThreadingHTTPServer):
    """Serves a page at `address`; what it asks is in `requests`, to be replied to in order."""

    daemon_threads = True

    def __init__(self, page: str, port: int = 0) -> None:
        """Begin to listen; port 0 is a free one.

        Raises:
            ConfigError: the port is taken.
        """
        self.page, self.token = page, secrets.token_urlsafe(24)
        self.requests: Queue[PageRequest] = Queue()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(f"`port` {port}: {error.strerror}; choose another one") from error

    @property
    def address(self) -> str:
        """Where the page is; whoever has it can pick."""
        return f"http://{LOOPBACK}:{self.server_port}/?token={self.token}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Answer HTTP in the background inside the block."""
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield
        finally:
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackServer
    timeout = 30  # a browser opens connections that it may never use

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        given = self.headers.get("X-Token") or parse_qs(place.query).get("token", [""])[0]
        if not self._may(given):
            return
        if place.path == "/":
            self._send_page()
        elif place.path == "/state" and self.headers.get("X-Token"):
            self._ask(None)
        else:
            self._send(404, "text/plain", "no such page")

    def do_POST(self) -> None:
        # A page from elsewhere cannot set this header, and cannot read the token.
        if not self._may(self.headers.get("X-Token") or ""):
            return
        if urlsplit(self.path).path != "/do":
            self._send(404, "text/plain", "no such page")
        elif (command := self._body()) is not None:
            self._ask(command)

    def _may(self, token: str) -> bool:
        own = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in own:  # another name that was made to lead here
            self._send(403, "text/plain", "this page is for the machine it runs on")
        elif origin is not None and origin.removeprefix("http://") not in own:
            self._send(403, "text/plain", "asked from another page")
        elif not compare_digest(token.encode(), self.server.token.encode()):
            self._send(403, "text/plain", "the token is missing or wrong; use the whole address")
        else:
            return True
        return False

    def _body(self) -> dict[str, Any] | None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self._send(413, "text/plain", "the request is too long or of no length")
            return None
        if self.headers.get_content_type() != "application/json":
            self._send(415, "text/plain", "send JSON")
            return None
        try:
            command = json.loads(self.rfile.read(int(length)))
        except ValueError:
            command = None
        if not isinstance(command, dict):
            self._send(400, "text/plain", "send a JSON object")
            return None
        return command

    def _ask(self, command: dict[str, Any] | None) -> None:
        request = PageRequest(command)
        self.server.requests.put(request)
        try:
            self._send(200, "application/json", json.dumps(request.reply.result(REPLY_TIMEOUT)))
        except TimeoutError:
            self._send(503, "text/plain", "the program is busy; reload this page")
        finally:
            request.answered.set()

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(12)
        page = self.server.page.replace("{nonce}", nonce)
        self._send(200, "text/html", page, CONTENT_SECURITY_POLICY.format(nonce=nonce))

    def _send(self, code: int, kind: str, text: str, policy: str = "default-src 'none'") -> None:
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

    def version_string(self) -> str:
        return "mlx-dpo"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: lines of HTTP would hide the address."""


SAMPLE_AHEAD = 1  # questions to have ready while the person reads
LAST_REPLY_TIMEOUT = 10.0  # seconds that the last reply may take to leave
NO_PROMPT_LEFT = "No prompt is left: u takes the last pick back, q finishes"
SKIP_REASONS = {"tie": TIE, "skip": SKIPPED}
PageState = dict[str, Any]


def read_page() -> str:
    """The page itself; it asks for nothing from elsewhere."""
    return (files("mlx_dpo.collect") / "collect.html").read_text("utf-8")


def serve_session(session: RankingSession, server: LoopbackServer) -> None:
    """Let the page decide until it is told to finish; samples ahead while nothing is asked."""
    over = False
    with server.running():
        while not over:
            while server.requests.empty() and session.ready <= SAMPLE_AHEAD and session.prepare():
                pass
            request = server.requests.get()
            over = (request.command or {}).get("do") == "quit"
            said = (
                None if request.command is None or over else run_command(session, request.command)
            )
            request.reply.set_result(page_state(session, said, over=over))
        request.answered.wait(LAST_REPLY_TIMEOUT)  # its thread ends with the program


def page_state(
    session: RankingSession, said: str | None = None, *, over: bool = False
) -> PageState:
    """What the page is to show now; `over` without looking for another question."""
    question = None if over else session.question
    asked = question.prompt.messages if question else ()
    if question is None and not over:
        said = said or NO_PROMPT_LEFT
    return {
        "question": state_token(session),
        "prompt": [{"role": turn["role"], "content": str(turn["content"])} for turn in asked],
        "answers": [answer.text.strip() for answer in question.answers] if question else [],
        "left": session.asked.left,
        "decided": len(session.picks.order),
        "said": said,
        "over": over,
    }


def state_token(session: RankingSession) -> str:
    """Tells one state of the session from the next, so that no key counts twice.

    What is passed over while answers are sampled ahead changes nothing of what a person sees.
    """
    question = session.question if session.ready else None
    return f"{session.decisions}:{question.prompt.key[:16] if question else ''}"


def run_command(session: RankingSession, command: PageState) -> str | None:
    """Obey a command of the page; what is to be said about it."""
    if command.get("question") != state_token(session):
        return "That was decided already"
    try:
        return _run_command(session, command)
    except (ConfigError, DataError) as error:
        return str(error)


def _run_command(session: RankingSession, command: PageState) -> str | None:
    what = command.get("do")
    if what == "undo":
        return None if session.undo() else "Nothing of this session to take back"
    if what in SKIP_REASONS:
        session.pass_over(SKIP_REASONS[what])
    elif what == "prefer":
        session.prefer(
            _answer_index(session, command.get("best")),
            _answer_index(session, command.get("worst")),
        )
    elif what == "improve":
        session.improve(_answer_index(session, command.get("worse")), str(command.get("text", "")))
    else:
        return f"Unknown command {what!r}"
    return None


def _answer_index(session: RankingSession, value: object) -> int:
    question = session.question
    if question is None or not isinstance(value, int) or not 0 <= value < len(question.answers):
        raise ConfigError(f"no answer {value!r}; choose one that is shown")
    return value
