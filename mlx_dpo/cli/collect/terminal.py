"""A person's picks at a terminal, one key each, or through a pipe, one line each."""

import os
import sys
import termios
import tty
from collections.abc import Callable
from contextlib import suppress
from textwrap import indent
from typing import TYPE_CHECKING

import click

from mlx_dpo.cli.answers import CONTROLS
from mlx_dpo.collect.session import SKIPPED, TIE, Asked, Question, Session
from mlx_dpo.collect.web import Loopback, page, serve_picks
from mlx_dpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mlx_dpo.data.prompts import Prompt

Typed = Callable[[], "Prompt | None"]
QUIT = "q"


def at_terminal(asked: Asked, *, typed: Typed | None) -> None:
    """Ask until no prompt is left, or the person leaves; `typed` gives prompts one by one."""
    session = Session(asked)
    while question := _next(session) or _next_typed(session, typed):
        _show(session, question)
        try:
            if not _turn(session, question):
                return
        except (ConfigError, DataError) as error:
            _say(f"{error}")


def _next(session: Session) -> Question | None:
    if not session.ready and session.asked.left:
        _say("Sampling answers …")
    return session.question


def _next_typed(session: Session, typed: Typed | None) -> Question | None:
    asked = session.asked
    while typed is not None and (prompt := typed()) is not None:
        [answers] = asked.sample([prompt], len(session.picks.order))
        if (question := asked.question(prompt, answers)) is not None:
            session.put(question)
            return question
        _say("The answers are alike; ask something else")
    return None


def _turn(session: Session, question: Question) -> bool:
    """Take one decision; False to leave."""
    key, rest = _key(_keys(question))
    places = {str(place + 1): place for place in range(len(question.answers))}
    if key in places:
        worst = _other(question, places, places[key], rest)
        if worst is not None:
            session.prefer(places[key], worst)
    elif key == "e":
        _edit(session, question, places, rest)
    elif key in ("t", "s"):
        session.pass_over(TIE if key == "t" else SKIPPED)
    elif key == "u":
        _say("Taken back" if session.undo() else "Nothing of this session to take back")
    elif key == QUIT:
        return False
    else:
        _say(f"Unknown key `{CONTROLS.sub('?', key)}`; nothing is decided")
    return True


def _other(question: Question, places: dict[str, int], best: int, rest: str) -> int | None:
    """The answer that is the worse one: the only other, or the one that is asked for."""
    if len(places) == 2:
        return 1 - best
    key = rest.strip() or _key("which is the worst? ")[0]
    if key not in places:
        _say("No such answer; nothing is kept")
    return places.get(key)


def _edit(session: Session, question: Question, places: dict[str, int], rest: str) -> None:
    """A text of the person's own against an answer: in an editor, or behind the key in a line."""
    name, _, text = rest.strip().partition(" ")
    name = name or _key("which answer do you improve? ")[0]
    if name not in places:
        _say("No such answer; nothing is kept")
        return
    worse = places[name]
    if not text and sys.stdin.isatty():
        text = click.edit(question.answers[worse].text) or ""
    session.improve(worse, text.removesuffix("\n"))


def _keys(question: Question) -> str:
    numbers = "/".join(str(place + 1) for place in range(len(question.answers)))
    return f"{numbers} is better · e edit · t tie · s skip · u undo · q quit: "


def _key(prompt: str) -> tuple[str, str]:
    """A key, and what stands behind it on the line where lines are read."""
    if sys.stdin.isatty():
        return _pressed(prompt), ""
    click.echo(prompt, err=True, nl=False)
    line = sys.stdin.readline()
    _say("")
    key, rest = line.strip()[:1], line.strip()[1:]
    return (key.lower() or ("?" if line else QUIT)), rest


def _pressed(prompt: str) -> str:
    """One key, without Enter. What was pressed before the prompt was there does not count."""
    place = sys.stdin.fileno()
    before = termios.tcgetattr(place)
    try:
        tty.setcbreak(place, termios.TCSAFLUSH)
        click.echo(prompt, err=True, nl=False)
        key = os.read(place, 16).decode("utf-8", "replace") or QUIT
    except KeyboardInterrupt:
        key = QUIT
    finally:
        termios.tcsetattr(place, termios.TCSADRAIN, before)
    _say(CONTROLS.sub("", key))
    return QUIT if key == "\x04" else key.lower()


def _show(session: Session, question: Question) -> None:
    left = session.asked.left
    _styled(f"\n{left:,} left\n" if left else "\n", dim=True)
    for turn in question.prompt.messages:
        _styled(f"{turn['role']}: ", bold=True)
        _say(_plain(str(turn["content"])))
    for place, answer in enumerate(question.answers, start=1):
        cut = " (cut: its tokens ran out)" if answer.is_cut else ""
        _styled(f"\n[{place}]{cut}\n", bold=True)
        _say(indent(_plain(answer.text.strip()), "    "))
    _say("")


def _styled(text: str, **style: bool) -> None:
    plain = bool(os.environ.get("NO_COLOR"))
    click.echo(text if plain else click.style(text, **style), err=True, nl=False)


def _plain(text: str) -> str:
    return CONTROLS.sub("", text)


def _say(line: str) -> None:
    click.echo(line, err=True)


def in_browser(asked: Asked, port: int) -> None:
    """Serve the page until the person finishes there, or Ctrl-C here."""
    server = Loopback(page(), port)
    click.echo(f"Pick in a browser on this machine: {server.address}", err=True)
    click.echo("Keys: 1, 2 … is better, e edit, t tie, s skip, u undo, q finish", err=True)
    with suppress(KeyboardInterrupt):
        serve_picks(Session(asked), server)
