"""Divide the time of an optimizer step, in code that is not changed for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dpo.optim.grouped_update import GroupedUpdate
from mlx_dpo.parallel.second_process import SecondProcess
from mlx_dpo.profiling.bench.device_speed import Clock

# Functions that start or await the device, or await another process.
WAITING: tuple[tuple[Any, str], ...] = (
    (mx, "eval"),
    (mx, "async_eval"),
    (mx, "synchronize"),
    (SecondProcess, "receive"),
)
UPDATE = (GroupedUpdate, "clip")  # the first thing that a step does with its gradients


class StepTime(NamedTuple):
    """Seconds of an optimizer step, of its gradients, and of waiting for these."""

    step: float
    gradients: float
    waiting: float


class WaitingTime:
    """Seconds during which at least one thread was inside a function that awaits the device."""

    def __init__(self, clock: Clock) -> None:
        self.seconds = 0.0
        self._clock, self._lock = clock, threading.Lock()
        self._waiting, self._began = 0, 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and counts as waiting."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                if not self._waiting:
                    self._began = self._clock()
                self._waiting += 1
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    self._waiting -= 1
                    if not self._waiting:
                        self.seconds += self._clock() - self._began

        return call


@contextmanager
def waiting_time(clock: Clock = time.perf_counter) -> Iterator[WaitingTime]:
    """Count the seconds that all threads together wait for the device inside the block.

    MLX's own functions are replaced for the block. MLX builds a graph without computing; the
    graph is computed inside of these functions.
    """
    waited = WaitingTime(clock)
    with _replaced({place: waited.timed(getattr(*place)) for place in WAITING}):
        yield waited


def time_step(step: Callable[[], object], clock: Clock = time.perf_counter) -> StepTime:
    """Return the seconds of `step`, which takes one optimizer step.

    Gradients are there when they are clipped; what follows is the update.

    Raises:
        RuntimeError: the step clipped no gradients.
    """
    clip = getattr(*UPDATE)
    marks: list[tuple[float, float]] = []  # time, and seconds of waiting until then
    with waiting_time(clock) as waited:

        def marked(*args: Any, **kwargs: Any) -> Any:
            marks.append((clock(), waited.seconds))
            return clip(*args, **kwargs)

        with _replaced({UPDATE: marked}):
            began = clock()
            step()
            ended = clock()
    if not marks:
        raise RuntimeError("the step clipped no gradients")
    computed, waiting = marks[0]
    return StepTime(ended - began, computed - began, waiting)


@contextmanager
def _replaced(functions: dict[tuple[Any, str], Callable[..., Any]]) -> Iterator[None]:
    """Replace functions, by owner and name, inside the block."""
    originals = {place: getattr(*place) for place in functions}
    try:
        for place, function in functions.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in originals.items():
            setattr(*place, function)
