"""The local web page on which a person ranks answers: HTTP server, page state and commands."""

import json
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.resources import files
from queue import Queue
from threading import Event
from time import monotonic
from typing import Any

from mlx_dpo.chat.field_types import Integer, Options, String
from mlx_dpo.collect.markdown_to_html import markdown_to_html
from mlx_dpo.collect.session import SKIPPED, TIE, RankingSession
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.web.json_body import BodyError, read_json_object
from mlx_dpo.web.loopback import LoopbackServer, PageHandler

MAX_BODY_BYTES = 1_000_000
INDEX = Integer(-MAX_BODY_BYTES, MAX_BODY_BYTES)  # of an answer; whether there is one is seen later
COMMAND = Options(
    {
        "do": String(100),
        "version": String(1_000),
        "best": INDEX,
        "worst": INDEX,
        "rejected": INDEX,
        "text": String(MAX_BODY_BYTES),
    }
)
REPLY_TIMEOUT = 600.0  # seconds; the reply waits for answers to be sampled
POLL_SECONDS = 0.2  # between looks at whether the session has ended
LAST_REPLY_TIMEOUT = 10.0  # seconds for the last reply to be sent before the program ends
SAMPLE_AHEAD = 1  # tasks to have ready while the person reads
NO_PROMPT_LEFT = "No prompt is left: u undoes the last decision, q finishes"
SKIP_REASONS = {"tie": TIE, "skip": SKIPPED}
PageState = dict[str, Any]


@dataclass(frozen=True)
class PageRequest:
    """A request from the ranking page: a command to run, or None to only read the page state."""

    command: dict[str, Any] | None
    reply: Future[PageState] = field(default_factory=Future)
    answered: Event = field(default_factory=Event)  # the reply was sent or the request gave up


class RankingServer(LoopbackServer):
    """The HTTP server of the ranking page.

    HTTP runs in threads, but the model must be used from one thread: the caller takes requests
    from the queue and sets their replies in order.
    """

    def __init__(self, page: str, port: int = 0) -> None:
        """Start listening on `port`; port 0 picks a free port.

        Raises:
            ConfigError: the port is in use.
        """
        self.page_template = page
        self.requests: Queue[PageRequest] = Queue()
        super().__init__(_Handler, port)


class _Handler(PageHandler):
    """HTTP handler of the ranking page."""

    server: RankingServer

    def page(self, nonce: str) -> str:
        return self.server.page_template.replace("{nonce}", nonce)

    def answer_get(self, path: str, query: dict[str, list[str]]) -> bool:
        if path != "/state":
            return False
        self._send_reply(None)
        return True

    def answer_post(self, path: str) -> bool:
        if path != "/do":
            return False
        if (command := self._read_command()) is not None:
            self._send_reply(command)
        return True

    def _read_command(self) -> dict[str, Any] | None:
        """Return the command in the request body, or send an error and return None."""
        if self.headers.get_content_type() != "application/json":
            self.send_text(415, "text/plain", "send JSON")
            return None
        try:
            return COMMAND.parse(read_json_object(self, limit=MAX_BODY_BYTES))
        except BodyError as error:
            self.send_text(error.status, "text/plain", str(error))
        except ValueError as error:
            self.send_text(400, "text/plain", f"the command {error}")
        return None

    def _send_reply(self, command: dict[str, Any] | None) -> None:
        """Queue a command, wait for the program's reply and send it to the page.

        None instead of a command only reads the page state.
        """
        request = PageRequest(command)
        self.server.requests.put(request)
        try:
            state = self._wait_for(request)
            if state is None:
                self.send_text(
                    503, "text/plain", "the program is busy or has ended; reload this page"
                )
            else:
                self.send_text(200, "application/json", json.dumps(state))
        finally:
            request.answered.set()

    def _wait_for(self, request: PageRequest) -> PageState | None:
        """Return the reply to a request; None after a long time or if the session has ended."""
        deadline = monotonic() + REPLY_TIMEOUT
        while monotonic() < deadline:
            has_ended = self.server.has_ended.is_set()  # before the reply is read
            try:
                return request.reply.result(POLL_SECONDS)
            except TimeoutError:
                if has_ended:
                    break
        return None


def read_page() -> str:
    """Return the HTML of the ranking page, which loads nothing from other hosts."""
    return (files("mlx_dpo.collect") / "collect.html").read_text("utf-8")


def serve_session(session: RankingSession, server: RankingServer) -> None:
    """Serve the ranking page and run its commands until the person quits.

    While no request waits, the answers to the next prompts are sampled.
    """
    over = False
    with server.running():
        while not over:
            while (
                server.requests.empty()
                and session.ready_count <= SAMPLE_AHEAD
                and session.sample_chunk()
            ):
                pass
            request = server.requests.get()
            over = (request.command or {}).get("do") == "quit"
            message = None
            if request.command is not None and not over:
                message = run_command(session, request.command)
            request.reply.set_result(page_state(session, message, over=over))
        request.answered.wait(LAST_REPLY_TIMEOUT)  # the reply's thread ends with the program


def page_state(
    session: RankingSession, message: str | None = None, *, over: bool = False
) -> PageState:
    """Return the content of the page as JSON values; `over` says that the session has ended."""
    task = None if over else session.current_task
    turns = task.prompt.messages if task else ()
    answers = [answer.text.strip() for answer in task.answers] if task else []
    if task is None and not over:
        message = message or NO_PROMPT_LEFT
    return {
        "version": state_version(session),
        "prompt": [
            {"role": turn["role"], "content": text, "html": markdown_to_html(text)}
            for turn in turns
            for text in [str(turn["content"])]
        ],
        "answers": answers,
        "answers_html": [markdown_to_html(text) for text in answers],
        "left": session.tasks.remaining,
        "decided": len(session.pairs_file.decisions),
        "can_undo": session.can_undo,
        "can_edit": session.tasks.can_edit,
        "message": message,
        "over": over,
    }


def state_version(session: RankingSession) -> str:
    """Return a text that identifies the current task and changes with every decision.

    A command that carries an older text (such as a repeated key press) is not run.
    """
    task = session.current_task if session.ready_count else None
    return f"{session.decision_count}:{task.prompt.key[:16] if task else ''}"


def run_command(session: RankingSession, command: PageState) -> str | None:
    """Run a command of the ranking page; return a message for the person, or None."""
    if command.get("version") != state_version(session):
        return "This prompt already has a decision"
    try:
        return _run_command(session, command)
    except (ConfigError, DataError) as error:
        return str(error)


def _run_command(session: RankingSession, command: PageState) -> str | None:
    name = command.get("do")
    if name == "undo":
        return None if session.undo() else "No decision of this session to undo"
    if name in SKIP_REASONS:
        session.skip(SKIP_REASONS[name])
    elif name == "prefer":
        best, worst = command.get("best"), command.get("worst")
        session.prefer(_answer_index(session, best), _answer_index(session, worst))
    elif name == "edit":
        rejected = _answer_index(session, command.get("rejected"))
        session.edit(rejected, str(command.get("text", "")))
    else:
        return f"Unknown command {name!r}"
    return None


def _answer_index(session: RankingSession, value: object) -> int:
    task = session.current_task
    if task is None or not isinstance(value, int) or not 0 <= value < len(task.answers):
        raise ConfigError(f"no answer {value!r}; choose one of the answers shown")
    return value
