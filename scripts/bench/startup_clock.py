"""Run `mlx-dpo train` up to the end of its first step, and record when each phase began and ended.

`bench_startup.py` starts this file as a program, with the code of the checkout to measure on
PYTHONPATH. It therefore imports nothing of this checkout.

    python -P startup_clock.py EVENTS BEGAN ARGUMENTS...

EVENTS is a file that receives the events as JSON, BEGAN the time at which the process was started,
ARGUMENTS the command line of `mlx-dpo`.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Event = tuple[str, str, float, float, float]


class Clock:
    """Events of the process: kind, title, seconds on the wall, user and system CPU seconds."""

    def __init__(self, path: Path, began: float) -> None:
        self._path, self._began = path, began
        self._events: list[Event] = []
        self._watches_steps = False

    def mark(self, kind: str, title: str) -> None:
        """Record an event; CPU seconds include those of worker processes."""
        times, (user, system) = os.times(), cpu_of_living_children()
        self._events.append(
            (
                kind,
                title,
                time.time() - self._began,
                times.user + times.children_user + user,
                times.system + times.children_system + system,
            )
        )

    def timed(self, phase: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function `phase` of the program, which also records the phases."""

        @contextlib.contextmanager
        def recorded(title: str, *arguments: Any, **options: Any) -> Iterator[Any]:
            self._stop_after_first_step()
            self.mark("begin", title)
            with phase(title, *arguments, **options) as advance:
                yield advance
            self.mark("end", title)

        return recorded

    def _stop_after_first_step(self) -> None:
        """End the process when the first row of metrics is written.

        The class that writes it is imported before the first phase begins.
        """
        metrics = sys.modules.get("mlx_dpo.reporting.metrics_log")
        if self._watches_steps or metrics is None:
            return
        self._watches_steps, write = True, metrics.MetricsLog.write

        def write_and_stop(log: Any, row: Any) -> None:
            write(log, row)
            self.mark("end", "step 1")
            self._path.write_text(json.dumps(self._events))
            os._exit(0)

        metrics.MetricsLog.write = write_and_stop


def cpu_of_living_children() -> tuple[float, float]:
    """Return user and system seconds of this process's children that run; zero without /proc."""
    totals, tick = [0.0, 0.0], os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            entries = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(entries[1]) == os.getpid():
            totals = [
                total + int(n) / tick for total, n in zip(totals, entries[11:13], strict=True)
            ]
    return totals[0], totals[1]


def main() -> None:
    """Run the command line of `mlx-dpo` with a clock."""
    path, began, *arguments = sys.argv[1:]
    clock = Clock(Path(path), float(began))
    import mlx_dpo.phases as phases

    phases.phase = clock.timed(phases.phase)
    from mlx_dpo.cli import main as program

    sys.argv = ["mlx-dpo", *arguments]
    program()


if __name__ == "__main__":
    main()
