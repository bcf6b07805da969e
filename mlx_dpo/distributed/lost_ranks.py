"""The rules by which a rank counts as lost, from its last heartbeat.

silent    no message for the timeout
closed    the connection ended, although the rank did not announce its end
missing   the rank ended before a collective operation that another rank has begun
stalled   no rank makes progress, for `STALL_FACTOR` times the timeout
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

STALL_FACTOR = 10
UNCOUNTED_FACTOR = 100  # in a phase that shows no progress, such as a download
BEAT_FIELDS = ("step", "operations", "progress", "phase", "counts")


@dataclass
class RankState:
    """A rank as the others know it by its last message.

    Attributes:
        name: rank and host, for messages.
        step: optimizer step that it computes.
        operations: collective operations that it has begun.
        progress: passes, operations and items of phases that it has finished.
        phase: title of the phase that it is in; "" outside of one.
        counts: whether the phase has advanced.
        exit_code: with which it announced its end; None while it runs.
        seen_at: time of the last message, of the monotonic clock in seconds.
        progressed_at: time of the last message that showed progress.
    """

    name: str
    step: int = 0
    operations: int = 0
    progress: int = 0
    phase: str = ""
    counts: bool = False
    exit_code: int | None = None
    seen_at: float = field(default_factory=time.monotonic)
    progressed_at: float = field(default_factory=time.monotonic)

    def update(self, beat: dict[str, Any], now: float) -> None:
        """Take over a heartbeat that arrived `now`."""
        self.seen_at = now
        if (beat["progress"], beat["operations"]) != (self.progress, self.operations):
            self.progressed_at = now
        for name in BEAT_FIELDS:
            setattr(self, name, beat[name])


def is_silent(state: RankState, now: float, timeout: float) -> bool:
    """Return whether a rank has sent nothing for `timeout` seconds."""
    return now - state.seen_at > timeout


def is_missing(state: RankState, states: Sequence[RankState]) -> bool:
    """Return whether a rank has ended before an operation that one that still runs has begun."""
    if state.exit_code is None:
        return False
    running = [each.operations for each in states if each.exit_code is None]
    return any(operations > state.operations for operations in running)


def find_stall(
    states: Sequence[RankState], now: float, timeout: float
) -> tuple[RankState, str] | None:
    """Return the rank that the others wait for, and what happened; None if there is progress."""
    running = [state for state in states if state.exit_code is None]
    if len(running) < 2:
        return None
    # All others wait in an operation that this rank has not begun.
    last = min(running, key=lambda state: (state.operations, state.progressed_at))
    idle = now - max(state.progressed_at for state in running)
    is_uncounted = bool(last.phase) and not last.counts
    if idle <= timeout * (UNCOUNTED_FACTOR if is_uncounted else STALL_FACTOR):
        return None
    doing = f" ({last.phase})" if last.phase else ""
    if all(state.operations == last.operations for state in running):
        return last, f"and all other ranks have made no progress for {idle:.0f} s{doing}"
    return last, f"has made no progress for {idle:.0f} s{doing}"
