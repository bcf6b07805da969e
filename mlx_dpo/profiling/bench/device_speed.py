"""Measure the speed of matrix products and of copies on MLX's device."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

Clock = Callable[[], float]  # returns a time in seconds
SQUARES = {"cpu": 512, "metal": 4096, "cuda": 8192}  # rows and columns of the timed matrices
# Of a copied array: beyond the caches of a GPU; on the CPU below what malloc maps at each use.
COPIED_BYTES = {"cpu": 2**24, "metal": 2**28, "cuda": 2**30}
MIN_SECONDS = 0.3  # that a speed is measured for
BATCH_SECONDS = 0.02  # that one evaluation takes at least; the wait for a GPU is much shorter
MAX_BATCH = 256


@dataclass(frozen=True)
class CopySpeed:
    """Bytes per second that are read and written when an array of `size` bytes is negated."""

    size: int
    bytes_per_second: float


@dataclass(frozen=True)
class ProductSpeed:
    """Speed of a product of matrices of the shapes (rows, inner) and (inner, columns)."""

    rows: int
    inner: int
    columns: int
    flops: float  # per second


def measure_product(
    rows: int,
    inner: int,
    columns: int,
    *,
    dtype: mx.Dtype = mx.float32,
    seconds: float = MIN_SECONDS,
    clock: Clock = time.perf_counter,
) -> ProductSpeed:
    """Measure the product of two random matrices for at least `seconds`."""
    a = mx.random.normal((rows, inner)).astype(dtype)
    b = mx.random.normal((inner, columns)).astype(dtype)
    per_product = measure_repeatedly(lambda: a @ b, (a, b), seconds=seconds, clock=clock)
    return ProductSpeed(rows, inner, columns, 2 * rows * inner * columns / per_product)


def measure_copy(
    size: int, *, seconds: float = MIN_SECONDS, clock: Clock = time.perf_counter
) -> CopySpeed:
    """Measure how fast an array of `size` bytes is read, and its negative is written.

    Negation stands for a copy, because MLX does not copy an array that nothing changes.
    """
    array = mx.random.normal((size // mx.float32.size,))
    per_copy = measure_repeatedly(
        lambda: mx.negative(array), (array,), seconds=seconds, clock=clock, most=1
    )
    return CopySpeed(array.nbytes, 2 * array.nbytes / per_copy)


def measure_repeatedly(
    operation: Callable[[], mx.array],
    inputs: tuple[mx.array, ...],
    *,
    seconds: float,
    clock: Clock,
    most: int = MAX_BATCH,
) -> float:
    """Return the seconds that `operation` takes, from the fastest of several batches.

    A batch is evaluated at once, so that the wait for its result is not counted for each operation.

    Args:
        operation: builds the result, which is not yet evaluated.
        inputs: arrays to evaluate first.
        seconds: time for which batches are repeated at least.
        most: largest number of operations in a batch; all their results are in memory at once.
    """
    mx.eval(inputs)
    mx.eval(operation())  # compiles the kernel
    best, size, started = float("inf"), 1, clock()
    while True:
        began = clock()
        mx.eval([operation() for _ in range(size)])
        ended = clock()
        best = min(best, (ended - began) / size)
        if ended - started >= seconds:
            return best
        if ended - began < BATCH_SECONDS:
            size = min(2 * size, most)
