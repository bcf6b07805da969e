"""Measure how long Python waits for MLX's device, in code that is not changed for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_dpo.profiling.bench.device_speed import Clock

WAITING = ("eval", "async_eval", "synchronize")  # MLX's functions that start or await the device


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
    originals = {name: getattr(mx, name) for name in WAITING}
    try:
        for name, function in originals.items():
            setattr(mx, name, waited.timed(function))
        yield waited
    finally:
        for name, function in originals.items():
            setattr(mx, name, function)
