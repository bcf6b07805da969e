"""Output of the commands: every text is printed here or by the console of `reporting`.

Nothing else in the package writes to stdout or stderr (a test checks it), so that no text from
outside can steer the terminal.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import click

from mlx_dpo.io.write_errors import name_file
from mlx_dpo.phases import paused
from mlx_dpo.terminal_text import escape_controls, escape_json, escape_line


class _Streams:
    """What this process may write to."""

    are_silent = False


def silence() -> None:
    """Print nothing from now on but errors: rank 0 of the run prints the same."""
    _Streams.are_silent = True
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def is_silent() -> bool:
    """Return whether this process prints nothing but errors."""
    return _Streams.are_silent


def echo(text: object = "", *, err: bool = False, nl: bool = True, **style: bool | str) -> None:
    """Print a text with its control characters visible.

    Args:
        text: the text; newlines and tabs stay.
        err: print to stderr instead of stdout.
        nl: end with a newline.
        style: styles of `click.style`, such as `bold=True`; ignored with NO_COLOR.
    """
    if _Streams.are_silent:
        return
    shown = escape_controls(str(text))
    if style and not os.environ.get("NO_COLOR"):
        shown = click.style(shown, **cast(Any, style))
    with paused(), name_file(Path("stderr" if err else "stdout")):
        click.echo(shown, err=err, nl=nl)


def echo_json(
    record: object, *, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> None:
    """Print a value as JSON on stdout; control characters are JSON escapes."""
    document = json.dumps(record, ensure_ascii=False, indent=indent, default=default)
    with paused(), name_file(Path("stdout")):
        click.echo(escape_json(document))


def print_warning(warning: str) -> None:
    """Print a warning on stderr, above a progress bar that is shown there."""
    if _Streams.are_silent:
        return
    # `click.echo` writes into the live bar's line where the locale is not UTF-8.
    with paused():
        print(f"Warning: {escape_line(warning)}", file=sys.stderr)


def print_error(message: str) -> None:
    """Print an error message of one or several lines on stderr, as click prints those it shows."""
    with paused():
        print(f"Error: {escape_controls(message)}", file=sys.stderr)


def print_line_of_library(line: str) -> None:
    """Print a line on stderr that C++ code of a rank has written there."""
    with paused():
        print(escape_controls(line), file=sys.stderr)


def show_cursor() -> None:
    """Show the cursor of the terminal, which a live display hides until it ends."""
    if sys.stdout.isatty():
        write_style("\x1b[?25h")


def write_text(text: str) -> None:
    """Write a model's text to stdout: exact to a pipe, with visible controls on a terminal."""
    # click.echo would strip escape sequences from what goes into a pipe.
    with paused(), name_file(Path("stdout")):
        sys.stdout.write(escape_controls(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def can_style(stream: Any) -> bool:
    """Return whether colors may be written to stdout or stderr: on a terminal, unless unwanted."""
    is_dumb = os.environ.get("TERM") == "dumb"
    return bool(stream.isatty()) and not is_dumb and not os.environ.get("NO_COLOR")


def write_style(sequence: str) -> None:
    """Write an escape sequence of ours, such as the one that dims text, to stdout."""
    with paused():
        sys.stdout.write(sequence)
        sys.stdout.flush()


class EscapedLogRecord(logging.LogRecord):
    """A log message of any library, with its control characters visible."""

    def getMessage(self) -> str:  # noqa: N802 (the name is the base class's)
        """Return the message, which may quote a model's files or an answer of a server."""
        return escape_controls(super().getMessage())


def escape_messages_of_libraries() -> None:
    """Make control characters visible in what libraries log, warn of, and raise."""
    logging.setLogRecordFactory(EscapedLogRecord)
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args: escape_controls(format_warning(*args))
    sys.excepthook = print_traceback


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback of an exception on stderr; a replacement for `sys.excepthook`."""
    lines = traceback.format_exception(kind, error, trace)
    sys.stderr.write(escape_controls("".join(lines)))
