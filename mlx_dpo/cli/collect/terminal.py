"""Let a person rank answers: with single keys at a terminal, with lines through a pipe."""

import os
import sys
import termios
import tty
from collections.abc import Callable
from contextlib import suppress
from textwrap import indent
from typing import TYPE_CHECKING

import click

from mlx_dpo.cli.output import echo
from mlx_dpo.collect.session import SKIPPED, TIE, RankingSession, RankingTask, TaskSampler
from mlx_dpo.collect.web import RankingServer, read_page, serve_session
from mlx_dpo.errors import ConfigError, DataError, DPOError
from mlx_dpo.startup.jit_cache import user_environment
from mlx_dpo.terminal_text import escape_line
from mlx_dpo.web.browser import open_in_browser

if TYPE_CHECKING:
    from mlx_dpo.data.prompts import Prompt

ReadPrompt = Callable[[], "Prompt | None"]
QUIT = "q"


def rank_at_terminal(tasks: TaskSampler, *, read_prompt: ReadPrompt | None) -> None:
    """Show ranking tasks and read decisions, until no prompt is left or the person quits.

    Ctrl-C quits as well, also while answers are sampled.

    Args:
        read_prompt: returns the next prompt typed by the person; None if prompts come from a file.
    """
    session = RankingSession(tasks)
    with suppress(KeyboardInterrupt):
        while task := _next_task(session) or _next_typed_task(session, read_prompt):
            _print_task(session, task)
            try:
                if not _take_decision(session, task):
                    return
            except (ConfigError, DataError) as error:
                _print(f"{error}")


def _next_task(session: RankingSession) -> RankingTask | None:
    tasks = session.tasks
    if not tasks.has_stored_answers and not session.ready_count and tasks.remaining:
        _print("Sampling answers …")
    return session.current_task


def _next_typed_task(session: RankingSession, read_prompt: ReadPrompt | None) -> RankingTask | None:
    tasks = session.tasks
    while read_prompt is not None and (prompt := read_prompt()) is not None:
        [answers] = tasks.sample_answers([prompt], len(session.pairs_file.decisions))
        if (task := tasks.make_task(prompt, answers)) is not None:
            session.insert(task)
            return task
        _print("The answers are identical; ask something else")
    return None


def _take_decision(session: RankingSession, task: RankingTask) -> bool:
    """Read a decision on the ranking task and store the decision; return False to quit."""
    can_edit = session.tasks.can_edit
    key, rest = _read_key(_key_prompt(task, can_edit=can_edit))
    indices = {str(index + 1): index for index in range(len(task.answers))}
    if key in indices:
        worst = _read_worst(indices, indices[key], rest)
        if worst is not None:
            session.prefer(indices[key], worst)
    elif key == "e" and can_edit:
        _edit_answer(session, task, indices, rest)
    elif key in ("t", "s"):
        session.skip(TIE if key == "t" else SKIPPED)
    elif key == "u":
        _print("Undone" if session.undo() else "No decision of this session to undo")
    elif key == QUIT:
        return False
    else:
        _print(f"Unknown key `{escape_line(key)}`; nothing is decided")
    return True


def _read_worst(indices: dict[str, int], best: int, rest: str) -> int | None:
    """Return the index of the worst answer, or None if there is no answer with the given key.

    With two answers, the worst is the one that is not `best`; with more, the person names it.
    `rest` is the rest of the input line after the first key, if the input is a pipe.
    """
    if len(indices) == 2:
        return 1 - best
    key = rest.strip() or _read_key("which is the worst? ")[0]
    if key not in indices:
        _print("No such answer; no pair is written")
    return indices.get(key)


def _edit_answer(
    session: RankingSession, task: RankingTask, indices: dict[str, int], rest: str
) -> None:
    """Store a text written by the person as better than one of the answers.

    At a terminal the person edits the answer in an editor; through a pipe the text is in `rest`.
    """
    name, _, text = rest.strip().partition(" ")
    name = name or _read_key("which answer do you want to edit? ")[0]
    if name not in indices:
        _print("No such answer; no pair is written")
        return
    rejected = indices[name]
    if not text and sys.stdin.isatty():
        text = click.edit(task.answers[rejected].text, env=user_environment()) or ""
    session.edit(rejected, text.removesuffix("\n"))


def _key_prompt(task: RankingTask, *, can_edit: bool) -> str:
    numbers = " or ".join(str(index + 1) for index in range(len(task.answers)))
    return f"better answer: {numbers}{' · e edit' * can_edit} · t tie · s skip · u undo · q quit: "


def _read_key(prompt: str) -> tuple[str, str]:
    """Return the key for a decision and, if stdin is a pipe, the rest of the key's line."""
    if sys.stdin.isatty():
        return _read_pressed_key(prompt), ""
    echo(prompt, err=True, nl=False)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError:
        # Not a `ConfigError`, after which the next line would be read; nothing more can be.
        raise DPOError("stdin: a line is not UTF-8; convert the text") from None
    _print("")
    key, rest = line.strip()[:1], line.strip()[1:]
    return (key.lower() or ("?" if line else QUIT)), rest


def _read_pressed_key(prompt: str) -> str:
    """Return the next key pressed, without waiting for Enter.

    Keys that were pressed before the prompt was shown are discarded.
    """
    terminal = sys.stdin.fileno()
    attributes = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSAFLUSH)
        echo(prompt, err=True, nl=False)
        key = os.read(terminal, 16).decode("utf-8", "replace") or QUIT
    except KeyboardInterrupt:
        key = QUIT
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, attributes)
    _print(escape_line(key))
    return QUIT if key == "\x04" else key.lower()


def _print_task(session: RankingSession, task: RankingTask) -> None:
    remaining = session.tasks.remaining
    _print_styled(f"\n{remaining:,} left\n" if remaining else "\n", dim=True)
    for turn in task.prompt.messages:
        _print_styled(f"{turn['role']}: ", bold=True)
        _print(str(turn["content"]))
    for number, answer in enumerate(task.answers, start=1):
        note = " (cut at the token limit)" if answer.is_truncated else ""
        _print_styled(f"\n[{number}]{note}\n", bold=True)
        _print(indent(answer.text.strip(), "    "))
    _print("")


def _print_styled(text: str, **style: bool) -> None:
    echo(text, err=True, nl=False, **style)


def _print(line: str) -> None:
    echo(line, err=True)


def rank_in_browser(tasks: TaskSampler, port: int, *, open_browser: bool) -> None:
    """Serve the ranking page until the person finishes there or presses Ctrl-C at the terminal.

    Args:
        port: port of the page; 0 picks a free one.
        open_browser: open the page in the default browser, if this machine has a screen.
    """
    server = RankingServer(read_page(), port)
    is_open = open_browser and open_in_browser(server.url)
    shown = "The page is open in your browser" if is_open else "Open this page in a browser"
    echo(f"{shown}: {server.url}", err=True)
    echo("Click the better answer, or press its number; q finishes (Ctrl-C here, too)", err=True)
    with suppress(KeyboardInterrupt):
        serve_session(RankingSession(tasks), server)
