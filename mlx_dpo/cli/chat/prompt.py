"""What a person types at a terminal: lines, several as one message, their history, and Ctrl-C."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import click

from mlx_dpo.paths import chat_history

BLOCK_MARK = '"""'
CONTINUATION_PROMPT = "... "
HISTORY_LINES = 1000  # lines that are kept

ReadLine = Callable[[str], str]


class TypedMessage(NamedTuple):
    """A message; one that is a block by itself is meant as it stands, and is no command."""

    text: str
    block: bool = False


def read_message(ask: ReadLine, prompt: str) -> TypedMessage:
    r"""One message: a line; more where it ends with `\`; or all lines of a block in `\"""`.

    A block may also stand behind a command.
    """
    line = ask(prompt)
    before, mark, rest = line.partition(BLOCK_MARK)
    if mark and (not before.strip() or before.startswith("/")):
        return TypedMessage(before + _block(ask, rest), block=not before.strip())
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(ask(CONTINUATION_PROMPT))
    return TypedMessage("\n".join(lines).strip())


def _block(ask: ReadLine, first: str) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(BLOCK_MARK):
        lines.append(ask(CONTINUATION_PROMPT))
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK_MARK)
    return "\n".join(lines).strip("\n")


def next_message(prompt: str) -> TypedMessage | None:
    """What is typed next; None to leave: Ctrl-D, or Ctrl-C twice in a row."""
    interrupted = False
    while True:
        try:
            return read_message(read_line, prompt)
        except EOFError:
            return None
        except KeyboardInterrupt:
            if interrupted:
                return None
            interrupted = True
            click.echo("\nCtrl-C once more leaves, as Ctrl-D and /exit do.", err=True)


def read_line(prompt: str) -> str:
    """One line. EOFError at the end of input, KeyboardInterrupt as it comes."""
    if sys.stdout.isatty():
        return input(prompt)  # readline must know the prompt to redraw the line
    click.echo(prompt, err=True, nl=False)
    return input()


def edit_text(prompt: str, text: str) -> str | None:
    """A message that begins as `text`, where the terminal can; None where nothing is typed."""
    readline = _readline()
    if readline is not None and "\n" not in text:
        readline.set_startup_hook(lambda: readline.insert_text(text))
    try:
        first = read_line(prompt)
    except (EOFError, KeyboardInterrupt):
        click.echo("", err=True)
        return None
    finally:
        if readline is not None:
            readline.set_startup_hook()
    lines = iter([first])
    return (
        read_message(lambda more: next(lines, None) or read_line(more), prompt).text.strip() or None
    )


@contextmanager
def line_editing() -> Iterator[None]:
    """Editing and history inside the block, with that of earlier chats, where there is readline."""
    readline = _readline()
    if readline is None:
        yield
        return
    path = chat_history()
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # what a person types is theirs
            readline.write_history_file(path)


def _readline() -> Any:
    try:
        import readline
    except ImportError:
        return None
    return readline
