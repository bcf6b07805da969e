"""Read a person's input at a terminal: lines, multi-line messages, history, and Ctrl-C."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from mlx_dpo.cli.output import can_style, echo, write_style
from mlx_dpo.errors import ConfigError
from mlx_dpo.paths import chat_history_file
from mlx_dpo.terminal_text import escape_controls, escape_line

BLOCK_MARK = '"""'
CONTINUATION_PROMPT = "... "
HISTORY_LINES = 1000
USER_STYLE, PLAIN_STYLE = "\x1b[36m", "\x1b[0m"  # cyan

ReadLine = Callable[[str], str]


class NotTextError(ConfigError):
    """A line of input is not UTF-8."""


class TypedMessage(NamedTuple):
    """A message that a person typed; if it is a block in `\"""` marks, it is never a command."""

    text: str
    is_block: bool = False


def read_message(read_line: ReadLine, prompt: str) -> TypedMessage:
    r"""Read one message: a line, lines joined by a final `\`, or a block between `\"""` marks.

    A block may also be the text after a command.
    """
    line = read_line(prompt)
    before, mark, rest = line.partition(BLOCK_MARK)
    if mark and (not before.strip() or before.startswith("/")):
        return TypedMessage(before + _read_block(read_line, rest), is_block=not before.strip())
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(read_line(CONTINUATION_PROMPT))
    return TypedMessage("\n".join(lines).strip())


def _read_block(read_line: ReadLine, first: str) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(BLOCK_MARK):
        lines.append(read_line(CONTINUATION_PROMPT))
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK_MARK)
    return "\n".join(lines).strip("\n")


def next_message(prompt: str) -> TypedMessage | None:
    """Read the next message of the chat; return None on Ctrl-D, or on Ctrl-C twice in a row."""
    interrupted = False
    while True:
        try:
            with _user_style():
                return read_message(read_line, prompt)
        except NotTextError as error:
            echo(f"Error: {error}", err=True)
        except EOFError:
            return None
        except KeyboardInterrupt:
            if interrupted:
                return None
            interrupted = True
            echo("\nPress Ctrl-C once more to leave; Ctrl-D and /exit leave too.", err=True)


@contextmanager
def _user_style() -> Iterator[None]:
    """Show the prompt and the text that a person types in color inside the `with` block.

    The terminal is set to the color: an escape sequence within the prompt would confuse readline.
    """
    if not can_style(sys.stdout):
        yield
        return
    write_style(USER_STYLE)
    try:
        yield
    finally:
        write_style(PLAIN_STYLE)


def read_line(prompt: str) -> str:
    """Read one line of input. Ctrl-C raises KeyboardInterrupt.

    Raises:
        EOFError: the input has ended.
        NotTextError: the line is not UTF-8.
    """
    try:
        if sys.stdout.isatty():
            # readline must know the prompt to redraw the line.
            line = input(escape_controls(prompt))
        else:
            echo(prompt, err=True, nl=False)
            line = input()
        line.encode()  # in some locales, Python keeps bytes that are no text
    except UnicodeError:
        raise NotTextError("the line is not UTF-8; type it again") from None
    return line


def edit_text(prompt: str, text: str) -> str | None:
    """Let the person edit `text` and return the new text; None if it is empty or input ended.

    Without readline, or if `text` has several lines or control characters, the person types the
    new text from scratch.
    """
    readline = _readline()
    if readline is not None and text == escape_line(text):
        readline.set_startup_hook(lambda: readline.insert_text(text))
    try:
        first = read_line(prompt)
    except (EOFError, KeyboardInterrupt):
        echo("", err=True)
        return None
    finally:
        if readline is not None:
            readline.set_startup_hook()
    lines = iter([first])
    message = read_message(lambda more: next(lines, None) or read_line(more), prompt)
    return message.text.strip() or None


@contextmanager
def line_editing() -> Iterator[None]:
    """Let the person edit lines and recall those of earlier chats inside the `with` block.

    Without readline, nothing changes.
    """
    readline = _readline()
    if readline is None:
        yield
        return
    path = chat_history_file()
    with suppress(OSError):
        readline.read_history_file(path or os.devnull)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        if path is not None:  # a home folder is known
            _write_history(readline, path)


def _write_history(readline: Any, path: Path) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # the history is private to its user
        readline.write_history_file(path)


def _readline() -> Any:
    try:
        import readline
    except ImportError:
        return None
    return readline
