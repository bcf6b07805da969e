"""Output of the commands: every text is printed here or by the console of `reporting`.

Nothing else in the package writes to stdout or stderr (a test checks it), so that no text from
outside can steer the terminal.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import click

from mlx_dpo.terminal_text import escape_controls, escape_json, escape_line


def echo(text: object = "", *, err: bool = False, nl: bool = True, **style: bool) -> None:
    """Print a text with its control characters visible.

    Args:
        text: the text; newlines and tabs stay.
        err: print to stderr instead of stdout.
        nl: end with a newline.
        style: styles of `click.style`, such as `bold=True`; ignored with NO_COLOR.
    """
    shown = escape_controls(str(text))
    if style and not os.environ.get("NO_COLOR"):
        shown = click.style(shown, **style)
    click.echo(shown, err=err, nl=nl)


def echo_json(
    record: object, *, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> None:
    """Print a value as JSON on stdout; control characters are JSON escapes."""
    document = json.dumps(record, ensure_ascii=False, indent=indent, default=default)
    click.echo(escape_json(document))


def print_warning(warning: str) -> None:
    """Print a warning on stderr, above a progress bar that is shown there."""
    # `click.echo` writes into the live bar's line where the locale is not UTF-8.
    print(f"Warning: {escape_line(warning)}", file=sys.stderr)


def write_text(text: str) -> None:
    """Write a model's text to stdout: exact to a pipe, with visible controls on a terminal."""
    # click.echo would strip escape sequences from what goes into a pipe.
    sys.stdout.write(escape_controls(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_style(sequence: str) -> None:
    """Write an escape sequence of ours, such as the one that dims text, to stdout."""
    sys.stdout.write(sequence)
    sys.stdout.flush()


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback of an exception on stderr; a replacement for `sys.excepthook`."""
    lines = traceback.format_exception(kind, error, trace)
    sys.stderr.write(escape_controls("".join(lines)))
