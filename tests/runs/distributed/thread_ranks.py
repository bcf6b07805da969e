"""Ranks that are threads of one process, for what they compare and send; they compute nothing.

def as_rank(ranks): ...

outcomes = run_ranks(2, as_rank)  # a value or an exception per rank
"""

import threading
from concurrent.futures import ThreadPoolExecutor

from mlx_dpo.distributed.ranks import Ranks, RanksError

PATIENCE = 20  # seconds until a rank that waits for another one fails


class ThreadRanks(Ranks):
    """A rank whose gathers meet those of other threads, which must have the same name."""

    def __init__(self, rank, size, barrier, rows):
        super().__init__()
        self.rank, self.size = rank, size
        self._barrier, self._rows = barrier, rows

    def all_gather_bytes(self, name, payload):
        self._rows[self.rank] = (name, payload)
        self._barrier.wait(PATIENCE)
        rows = list(self._rows)
        self._barrier.wait(PATIENCE)
        if any(other != name for other, _ in rows):
            raise RanksError(f"rank {self.rank} is at another operation ({name})")
        return [content for _, content in rows]


def run_ranks(size, function):
    """Return what `function` returns or raises when it is called with each rank."""
    barrier, rows = threading.Barrier(size), [None] * size

    def run(rank):
        try:
            return function(ThreadRanks(rank, size, barrier, rows))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
