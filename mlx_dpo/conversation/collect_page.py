"""The page on which a person picks: what it shows, and what its keys do."""

from importlib.resources import files
from typing import Any

from mlx_dpo.conversation.collecting import SKIPPED, TIE, Session
from mlx_dpo.conversation.loopback import Loopback
from mlx_dpo.errors import ConfigError, DataError

AHEAD = 1  # questions to have ready while the person reads
PARTING = 10.0  # seconds that the last reply may take to leave
NONE_LEFT = "No prompt is left: u takes the last pick back, q finishes"
PASSED = {"tie": TIE, "skip": SKIPPED}
State = dict[str, Any]


def page() -> str:
    """The page itself; it asks for nothing from elsewhere."""
    return (files("mlx_dpo.conversation") / "collect.html").read_text("utf-8")


def serve_picks(session: Session, server: Loopback) -> None:
    """Let the page decide until it is told to finish; samples ahead while nothing is asked."""
    over = False
    with server.running():
        while not over:
            while server.requests.empty() and session.ready <= AHEAD and session.prepare():
                pass
            request = server.requests.get()
            over = (request.command or {}).get("do") == "quit"
            said = None if request.command is None or over else do(session, request.command)
            request.reply.set_result(shown(session, said, over=over))
        request.answered.wait(PARTING)  # its thread ends with the program


def shown(session: Session, said: str | None = None, *, over: bool = False) -> State:
    """What the page is to show now; `over` without looking for another question."""
    question = None if over else session.question
    asked = question.prompt.messages if question else ()
    if question is None and not over:
        said = said or NONE_LEFT
    return {
        "question": mark(session),
        "prompt": [{"role": turn["role"], "content": str(turn["content"])} for turn in asked],
        "answers": [answer.text.strip() for answer in question.answers] if question else [],
        "left": session.asked.left,
        "decided": len(session.picks.order),
        "said": said,
        "over": over,
    }


def mark(session: Session) -> str:
    """Tells one state of the session from the next, so that no key counts twice.

    What is passed over while answers are sampled ahead changes nothing of what a person sees.
    """
    question = session.question if session.ready else None
    return f"{session.decisions}:{question.prompt.key[:16] if question else ''}"


def do(session: Session, command: State) -> str | None:
    """Obey a command of the page; what is to be said about it."""
    if command.get("question") != mark(session):
        return "That was decided already"
    try:
        return _do(session, command)
    except (ConfigError, DataError) as error:
        return str(error)


def _do(session: Session, command: State) -> str | None:
    what = command.get("do")
    if what == "undo":
        return None if session.undo() else "Nothing of this session to take back"
    if what in PASSED:
        session.pass_over(PASSED[what])
    elif what == "prefer":
        session.prefer(_place(session, command.get("best")), _place(session, command.get("worst")))
    elif what == "improve":
        session.improve(_place(session, command.get("worse")), str(command.get("text", "")))
    else:
        return f"Unknown command {what!r}"
    return None


def _place(session: Session, value: object) -> int:
    question = session.question
    if question is None or not isinstance(value, int) or not 0 <= value < len(question.answers):
        raise ConfigError(f"no answer {value!r}; choose one that is shown")
    return value
