"""Test the link between the ranks: how fast it is, and whether what arrives is what was sent."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dpo.distributed.ranks import Ranks

SMALL_GATHERS = 300  # by which the latency is measured
SPEED_BYTES = (2**20, 2**23, 2**26)  # per rank, of the gathers by which the speed is measured
SPEED_ROUNDS = 7
# Of the gathers whose values are checked: below, at and above powers of 2, odd ones, one element.
VALUE_SIZES = (1, 2, 3, 31, 1000, 4095, 4096, 4097, 65_537, 2**20 + 1)
VALUE_ROUNDS = 3
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "uint8": mx.uint8}
LATENCY, SPEED, VALUES = "latency of the link", "speed of the link", "values over the link"


@dataclass(frozen=True)
class Speed:
    """Speed of a gather.

    Attributes:
        size: bytes that each rank sends.
        seconds: median over the rounds, of the slowest rank.
        received: bytes per second that a rank received from the others in it.
    """

    size: int
    seconds: float
    received: float


@dataclass(frozen=True)
class WrongValue:
    """A value that arrived otherwise than it was sent.

    Attributes:
        sender: rank that sent it.
        receiver: rank that received it.
        size: elements of the array.
        dtype: their type.
        index: the first element that is wrong.
    """

    sender: int
    receiver: int
    size: int
    dtype: str
    index: int


@dataclass(frozen=True)
class LinkReport:
    """What was measured between the ranks; the same on all of them.

    Attributes:
        backend: MLX's backend.
        latency: seconds of a gather of a few bytes: median, of the slowest rank.
        worst_latency: the longest of all.
        speeds: by size.
        compared: arrays whose values were compared, on all ranks together.
        wrong: the ones that were not as sent.
    """

    backend: str
    latency: float
    worst_latency: float
    speeds: list[Speed]
    compared: int
    wrong: list[WrongValue]

    def as_record(self) -> dict[str, Any]:
        """Return the report as a value of JSON."""
        return asdict(self)


def measure_link(ranks: Ranks) -> LinkReport:
    """Measure the link between several ranks and check values over it; all ranks call this."""
    latency, worst = _measure_latency(ranks)
    speeds = [_measure_speed(ranks, size) for size in SPEED_BYTES]
    found = list(_find_wrong_values(ranks))
    wrong = [
        WrongValue(**record)
        for records in ranks.all_gather_json(VALUES, [asdict(value) for value in found])
        for record in records
    ]
    compared = ranks.size**2 * VALUE_ROUNDS * len(VALUE_SIZES) * len(DTYPES)
    return LinkReport(str(ranks.backend), latency, worst, speeds, compared, wrong)


def _measure_latency(ranks: Ranks) -> tuple[float, float]:
    """Return the median and the longest time of a small gather, in seconds."""
    mine = mx.array([ranks.rank], dtype=mx.int64)
    seconds = [_time(ranks, mine) for _ in range(SMALL_GATHERS)]
    by_rank = ranks.all_gather_json(LATENCY, [median(seconds), max(seconds)])
    return max(row[0] for row in by_rank), max(row[1] for row in by_rank)


def _measure_speed(ranks: Ranks, size: int) -> Speed:
    mine = mx.full((size // 4,), ranks.rank, dtype=mx.float32)
    _time(ranks, mine)  # the first one allocates
    seconds = []
    for _ in range(SPEED_ROUNDS):
        ranks.any(SPEED, False)  # begins everywhere at the same time
        seconds.append(_time(ranks, mine))
    slowest = max(ranks.all_gather_json(SPEED, median(seconds)))
    return Speed(size, slowest, (ranks.size - 1) * size / slowest)


def _time(ranks: Ranks, mine: mx.array) -> float:
    mx.eval(mine)
    start = time.perf_counter()
    ranks.all_gather_rows(SPEED, mine)
    return time.perf_counter() - start


def _find_wrong_values(ranks: Ranks) -> Iterator[WrongValue]:
    """Gather arrays of many sizes and yield what this rank received otherwise than it was sent."""
    for round_number in range(VALUE_ROUNDS):
        for size in VALUE_SIZES:
            for name, dtype in DTYPES.items():
                sent = [_numbers(rank, round_number, size) for rank in range(ranks.size)]
                mine = mx.array(sent[ranks.rank]).astype(dtype)
                rows = np.array(ranks.all_gather_rows(VALUES, mine).astype(mx.float32))
                for sender, numbers in enumerate(sent):
                    differs = np.flatnonzero(rows[sender] != numbers)
                    if len(differs):
                        yield WrongValue(sender, ranks.rank, size, name, int(differs[0]))


def _numbers(rank: int, round_number: int, size: int) -> np.ndarray:
    """Return whole numbers below 256, which each dtype holds, that differ by rank and round."""
    generator = np.random.default_rng([rank, round_number, size])
    return generator.integers(0, 256, size).astype(np.float32)
