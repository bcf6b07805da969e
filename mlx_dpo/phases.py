"""Phases of long work: library code names them, and a display shows them if the caller sets one.

Nothing is shown by default. The command line sets a display of `reporting/terminal/status.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]


class PhaseDisplay(Protocol):
    """Interface of a display of phases."""

    def announce(self, title: str) -> None:
        """Show a title until the next phase begins or something is printed."""

    def show(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """Show a phase inside the `with` block; yield a function that advances its count."""

    def paused(self) -> AbstractContextManager[None]:
        """Leave the terminal to other output inside the `with` block."""


class NoDisplay:
    """A display that shows nothing."""

    def announce(self, title: str) -> None:
        """Show nothing."""

    @contextmanager
    def show(self, title: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Yield a function that ignores the count."""
        yield lambda count: None

    def paused(self) -> AbstractContextManager[None]:
        """Do nothing: there is nothing on the terminal."""
        return nullcontext()


Watcher = Callable[[str, int], None]  # takes the title of a phase, and the items done in it


class _Current:
    """The display in use: one per process, so that phases of worker threads are shown as well."""

    display: PhaseDisplay = NoDisplay()
    watcher: Watcher | None = None


def watch(watcher: Watcher) -> None:
    """Call `watcher` when a phase begins, advances, or ends (with the title "")."""
    _Current.watcher = watcher


@contextmanager
def shown_on(display: PhaseDisplay) -> Iterator[None]:
    """Show phases on `display` inside the `with` block, then on the earlier display again."""
    earlier, _Current.display = _Current.display, display
    try:
        yield
    finally:
        _Current.display = earlier


def announce(title: str) -> None:
    """Show what the program does until the next phase begins or something is printed."""
    _Current.display.announce(title)


def phase(
    title: str, total: int | None = None, *, unit: str = "pairs"
) -> AbstractContextManager[Advance]:
    """Show a phase of long work inside the `with` block.

    Args:
        title: the work as a participle and its object, such as `Loading model`.
        total: number of items; None if they are not counted, or the number is unknown.
        unit: name of the items.

    Returns:
        A context that yields a function; call it with the number of items done since its last call.
    """
    shown = _Current.display.show(title, total, unit)
    return shown if _Current.watcher is None else _watched(shown, title, _Current.watcher)


@contextmanager
def _watched(
    shown: AbstractContextManager[Advance], title: str, watcher: Watcher
) -> Iterator[Advance]:
    """Call the watcher in addition to what shows the phase."""

    def advance(items: int) -> None:
        watcher(title, items)
        advance_shown(items)

    watcher(title, 0)
    with shown as advance_shown:
        yield advance
    watcher("", 0)


def paused() -> AbstractContextManager[None]:
    """Leave the terminal to other output inside the `with` block; then show the phase again."""
    return _Current.display.paused()
