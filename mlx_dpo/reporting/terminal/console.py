"""Consoles on which text from outside has no effect. Imports no model library."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mlx_dpo.phases import paused
from mlx_dpo.terminal_text import escape_controls


class TerminalConsole(Console):
    """A console on which text from outside has no effect.

    Control characters are shown as visible escapes; markup such as `[bold]` and names of emojis
    such as `:train:` are shown as they are written.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return `text` with visible control characters as text that can be styled."""
        return super().render_str(escape_controls(text), **settings)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments of a renderable; control characters are visible in all of them."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else _escape_segment(segment)


class OutputConsole(TerminalConsole):
    """A console for results: the status of a phase leaves the terminal while it prints."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print objects; see `rich.console.Console.print`."""
        with paused():
            super().print(*objects, **settings)


class StatusConsole(TerminalConsole):
    """A console on stderr for what the program does; the cursor stays visible."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor alone: a killed program would leave a terminal without one."""
        return False


def make_console() -> OutputConsole:
    """Return a console for stdout; colours and live updates are used only on a terminal."""
    is_terminal = sys.stdout.isatty()
    is_plain = bool(os.environ.get("NO_COLOR")) or not is_terminal
    # Rich takes FORCE_COLOR, as CI sets it, for a terminal: its live updates would fill a log.
    return OutputConsole(no_color=is_plain, soft_wrap=is_plain, force_terminal=is_terminal)


def make_status_console() -> StatusConsole:
    """Return a console for stderr, a terminal only if stderr is one."""
    is_terminal = sys.stderr.isatty()
    is_plain = bool(os.environ.get("NO_COLOR")) or not is_terminal
    return StatusConsole(
        stderr=True, no_color=is_plain, soft_wrap=not is_terminal, force_terminal=is_terminal
    )


def _escape_segment(segment: Segment) -> Segment:
    return Segment(escape_controls(segment.text), segment.style)


def print_rule(console: Console) -> None:
    """Print a line over the whole width of a terminal; in a log, nothing."""
    if console.is_terminal:
        console.rule(style="dim", characters="-" if console.options.ascii_only else "─")


def print_label_table(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print (label, text) pairs in two columns; a terminal wraps long texts within the column."""
    width = max([13, *(len(label) for label, _ in facts)])
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", min_width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts:
        if not console.is_terminal:
            console.print(f"{label:<{width}} {text}")
        table.add_row(label, text)
    if console.is_terminal:
        console.print(table)
