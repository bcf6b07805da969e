"""What a trainer is asked in a process of its own, and what it answers. Standard library only.

A module that calls `answer(train)` reads a job from its standard input and prints its result as
the last line of its standard output; all else that it or its libraries print goes to the errors.
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
    """One epoch over the pairs of a file: the same for every trainer but for `setting`."""

    model: str
    pairs: str
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 5e-6
    beta: float = 0.1
    step_pairs: int = 16  # pairs per optimizer step, for trainers that can gather gradients
    max_length: int = 8192  # all that the model places: nothing is cut
    threads: int = 2
    setting: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one epoch took. Clocks start when the texts are token ids and weights are loaded."""

    pairs: int
    tokens: int  # prompt + chosen and prompt + rejected, without padding, over the epoch
    trainable: int  # adapter weights
    reference_s: float | None  # None: the reference is scored inside the steps
    training_s: float
    peak_bytes: int | None  # beyond the weights by MLX's counters; None for others
    resident_bytes: int  # growth of the process at its peak over what it held with the weights
    versions: str

    @property
    def first_epoch(self) -> float:
        """Pairs per second, reference included."""
        return self.pairs / ((self.reference_s or 0.0) + self.training_s)

    @property
    def cached_epoch(self) -> float | None:
        """Pairs per second once the reference is known; None for trainers that keep none."""
        return None if self.reference_s is None else self.pairs / self.training_s


class Memory:
    """Growth of a process from here on, in bytes."""

    def __init__(self) -> None:
        machine.forget_peak()
        self._before = machine.resident_bytes()

    def growth(self) -> int:
        """How much more was held at the peak."""
        return max(0, machine.peak_resident_bytes() - self._before)


def read_texts(job: Job) -> list[dict[str, str]]:
    """The pairs of the job's file."""
    return [json.loads(line) for line in Path(job.pairs).read_text().splitlines()]


def answer(train: Callable[[Job, Path], Result]) -> None:
    """Run the job on standard input in an empty folder and print the result as JSON."""
    out = os.dup(1)
    os.dup2(2, 1)  # libraries print to the terminal from C as well
    job = Job(**json.load(sys.stdin))
    with tempfile.TemporaryDirectory() as folder:
        result = train(job, Path(folder))
    sys.stdout.flush()
    with os.fdopen(out, "w") as stream:
        print(json.dumps(asdict(result)), file=stream)
