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
from mlx_dpo.collect.session import SKIPPED, TIE, RankingSession, RankingTask, TaskSampler
from mlx_dpo.collect.web import LoopbackServer, read_page, serve_session
from mlx_dpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mlx_dpo.data.prompts import Prompt

ReadPrompt = Callable[[], "Prompt | None"]
QUIT = "q"


def rank_at_terminal(asked: TaskSampler, *, typed: ReadPrompt | None) -> None:
    """Ask until no prompt is left, or the person leaves; `typed` gives prompts one by one."""
    session = RankingSession(asked)
    while question := _next_task(session) or _next_typed_task(session, typed):
        _print_task(session, question)
        try:
            if not _take_decision(session, question):
                return
        except (ConfigError, DataError) as error:
            _print(f"{error}")


def _next_task(session: RankingSession) -> RankingTask | None:
    if not session.ready and session.asked.left:
        _print("Sampling answers …")
    return session.question


def _next_typed_task(session: RankingSession, typed: ReadPrompt | None) -> RankingTask | None:
    asked = session.asked
    while typed is not None and (prompt := typed()) is not None:
        [answers] = asked.sample([prompt], len(session.picks.order))
        if (question := asked.question(prompt, answers)) is not None:
            session.put(question)
            return question
        _print("The answers are alike; ask something else")
    return None


def _take_decision(session: RankingSession, question: RankingTask) -> bool:
    """Take one decision; False to leave."""
    key, rest = _read_key(_key_prompt(question))
    places = {str(place + 1): place for place in range(len(question.answers))}
    if key in places:
        worst = _read_worst(question, places, places[key], rest)
        if worst is not None:
            session.prefer(places[key], worst)
    elif key == "e":
        _edit(session, question, places, rest)
    elif key in ("t", "s"):
        session.pass_over(TIE if key == "t" else SKIPPED)
    elif key == "u":
        _print("Taken back" if session.undo() else "Nothing of this session to take back")
    elif key == QUIT:
        return False
    else:
        _print(f"Unknown key `{CONTROLS.sub('?', key)}`; nothing is decided")
    return True


def _read_worst(question: RankingTask, places: dict[str, int], best: int, rest: str) -> int | None:
    """The answer that is the worse one: the only other, or the one that is asked for."""
    if len(places) == 2:
        return 1 - best
    key = rest.strip() or _read_key("which is the worst? ")[0]
    if key not in places:
        _print("No such answer; nothing is kept")
    return places.get(key)


def _edit(
    session: RankingSession, question: RankingTask, places: dict[str, int], rest: str
) -> None:
    """A text of the person's own against an answer: in an editor, or behind the key in a line."""
    name, _, text = rest.strip().partition(" ")
    name = name or _read_key("which answer do you improve? ")[0]
    if name not in places:
        _print("No such answer; nothing is kept")
        return
    worse = places[name]
    if not text and sys.stdin.isatty():
        text = click.edit(question.answers[worse].text) or ""
    session.improve(worse, text.removesuffix("\n"))


def _key_prompt(question: RankingTask) -> str:
    numbers = "/".join(str(place + 1) for place in range(len(question.answers)))
    return f"{numbers} is better · e edit · t tie · s skip · u undo · q quit: "


def _read_key(prompt: str) -> tuple[str, str]:
    """A key, and what stands behind it on the line where lines are read."""
    if sys.stdin.isatty():
        return _read_pressed_key(prompt), ""
    click.echo(prompt, err=True, nl=False)
    line = sys.stdin.readline()
    _print("")
    key, rest = line.strip()[:1], line.strip()[1:]
    return (key.lower() or ("?" if line else QUIT)), rest


def _read_pressed_key(prompt: str) -> str:
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
    _print(CONTROLS.sub("", key))
    return QUIT if key == "\x04" else key.lower()


def _print_task(session: RankingSession, question: RankingTask) -> None:
    left = session.asked.left
    _print_styled(f"\n{left:,} left\n" if left else "\n", dim=True)
    for turn in question.prompt.messages:
        _print_styled(f"{turn['role']}: ", bold=True)
        _print(_strip_controls(str(turn["content"])))
    for place, answer in enumerate(question.answers, start=1):
        cut = " (cut: its tokens ran out)" if answer.is_cut else ""
        _print_styled(f"\n[{place}]{cut}\n", bold=True)
        _print(indent(_strip_controls(answer.text.strip()), "    "))
    _print("")


def _print_styled(text: str, **style: bool) -> None:
    plain = bool(os.environ.get("NO_COLOR"))
    click.echo(text if plain else click.style(text, **style), err=True, nl=False)


def _strip_controls(text: str) -> str:
    return CONTROLS.sub("", text)


def _print(line: str) -> None:
    click.echo(line, err=True)


def rank_in_browser(asked: TaskSampler, port: int) -> None:
    """Serve the page until the person finishes there, or Ctrl-C here."""
    server = LoopbackServer(read_page(), port)
    click.echo(f"Pick in a browser on this machine: {server.address}", err=True)
    click.echo("Keys: 1, 2 … is better, e edit, t tie, s skip, u undo, q finish", err=True)
    with suppress(KeyboardInterrupt):
        serve_session(RankingSession(asked), server)
