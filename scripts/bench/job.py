"""Protocol between the benchmark and a trainer in its own process. Standard library only.

`run_job(train)` reads a job from standard input and prints the result as the last line of standard
output. Everything else that the trainer and its libraries print goes to standard error.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench import machine


@dataclass(frozen=True, kw_only=True)
class Job:
    """One epoch over a file of pairs: equal for all trainers, except for `setting`."""

    model: str
    pairs: str
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 5e-6
    beta: float = 0.1
    step_pairs: int = 16  # pairs per optimizer step, for trainers with gradient accumulation
    max_length: int = 8192  # the context length: nothing is truncated
    threads: int = 2
    setting: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Time and memory of one epoch, after tokenization and loading of the weights."""

    pairs: int
    tokens: int  # prompt + chosen and prompt + rejected, without padding, over the epoch
    trainable: int  # adapter weights
    reference_s: float | None  # None: the reference is scored in the steps
    training_s: float
    peak_bytes: int | None  # beyond the weights by MLX's counters; None for others
    resident_bytes: int  # peak growth of the process since the weights were loaded
    cpu_s: tuple[float, float]  # user and system seconds since then, of all threads
    versions: str

    @property
    def first_epoch(self) -> float:
        """Pairs per second, including the reference."""
        return self.pairs / ((self.reference_s or 0.0) + self.training_s)

    @property
    def cached_epoch(self) -> float | None:
        """Pairs per second with cached reference log-probs; None for trainers without a cache."""
        return None if self.reference_s is None else self.pairs / self.training_s


class ProcessUsage:
    """Memory and CPU time of the process since construction."""

    def __init__(self) -> None:
        machine.reset_peak()
        self._memory, self._times = machine.resident_bytes(), os.times()

    def memory_growth(self) -> int:
        """Return the growth of the resident memory at its peak, in bytes."""
        return max(0, machine.peak_resident_bytes() - self._memory)

    def cpu_seconds(self, *, with_children: bool = False) -> tuple[float, float]:
        """Return the user and the system seconds of all threads.

        Args:
            with_children: whether processes count that this one started and that have ended.
        """
        user, system, *of_children = (
            now - before for now, before in zip(os.times()[:4], self._times[:4], strict=True)
        )
        if with_children:
            user, system = user + of_children[0], system + of_children[1]
        return user, system


def read_texts(job: Job) -> list[dict[str, str]]:
    """Return the pairs of the job's file."""
    return [json.loads(line) for line in Path(job.pairs).read_text().splitlines()]


def run_job(train: Callable[[Job, Path], Result]) -> None:
    """Run the job on standard input in an empty folder and print the result as JSON."""
    out = os.dup(1)
    os.dup2(2, 1)  # libraries print to the terminal from C as well
    job = Job(**json.load(sys.stdin))
    with tempfile.TemporaryDirectory() as folder:
        result = train(job, Path(folder))
    sys.stdout.flush()
    with os.fdopen(out, "w") as stream:
        print(json.dumps(asdict(result)), file=stream)
