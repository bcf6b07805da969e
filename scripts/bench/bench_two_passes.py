"""Two passes at once on the CPU, against one after the other: wall, user and system seconds.

    python -m scripts.bench.bench_two_passes                         SmolLM2-135M's shape
    python -m scripts.bench.bench_two_passes --shape tiny --repeats 1     a try in seconds

Eight pairs with the lengths of hh-rlhf's, two in a pass: their gradients, and their log-probs. The
ways alternate, and each has both threads: one process with two threads of OpenBLAS, or two with one
thread each. `one thread` is one process with one thread. The second process is started before the
clock. Rows are appended to docs/bench/two-passes.csv.
"""

import argparse
import os
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX
from mlx_dpo.errors import DPOError
from mlx_dpo.startup import openblas

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.config.loss import LossSettings
from mlx_dpo.config.training import PassLimit
from mlx_dpo.parallel.second_process import PASSES_AT_ONCE, SecondProcess
from mlx_dpo.profiling.bench.shapes import SEED, SHAPES, RandomTokens
from mlx_dpo.profiling.device_memory import limited_buffers
from mlx_dpo.scoring.score_pairs import Processes, score_pairs
from mlx_dpo.scoring.scorers import memory_efficient_training
from mlx_dpo.scoring.select_scorer import ScorerChoice, select_scorer
from mlx_dpo.training.objective import Objective
from mlx_dpo.training.plan import MicroBatch
from mlx_dpo.training.step import loss_and_gradients, make_second_process
from mlx_dpo.types import PairLogps, TokenizedPair
from scripts.bench import machine, steps, tables

CSV = machine.ROOT / "docs" / "bench" / "two-passes.csv"
LENGTHS = (
    (106, 38, 46), (60, 20, 70), (150, 60, 40), (90, 30, 30),
    (110, 45, 50), (100, 25, 35), (200, 70, 60), (40, 15, 40),
)  # fmt: skip
PAIRS_PER_PASS = 2
OBJECTIVE = Objective(LossSettings(beta=steps.BETA))
COLUMNS = ("pass", "way", "wall_s", "user_s", "system_s", "pairs_per_s")


class Way(NamedTuple):
    """A way to compute the passes: passes at once, and threads of OpenBLAS in all."""

    name: str
    passes_at_once: int
    threads: int


WAYS = (Way("two threads", 1, 2), Way("two processes", 2, 2), Way("one thread", 1, 1))


class Seconds(NamedTuple):
    """Wall time, and CPU time of this process and the second one."""

    wall: float
    user: float
    system: float


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_two_passes",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2-135m", help="shape of the model")
    add("--repeats", type=int, default=3, help="timed runs; the median counts (default: 3)")
    add("--csv", type=Path, default=CSV, help="file to append rows to")
    return parser.parse_args(arguments)


def draw_pairs(vocab_size: int) -> list[TokenizedPair]:
    """Return random pairs of the lengths that are measured."""
    tokens = RandomTokens(vocab_size)
    return [TokenizedPair(*(tokens(length) for length in lengths)) for lengths in LENGTHS]


def timed(compute: Callable[[], object], second: SecondProcess | None) -> Seconds:
    """Return the time that `compute` takes."""
    before, start = cpu_seconds(second), perf_counter()
    compute()
    wall, after = perf_counter() - start, cpu_seconds(second)
    return Seconds(wall, after[0] - before[0], after[1] - before[1])


def cpu_seconds(second: SecondProcess | None) -> tuple[float, float]:
    """Return user and system time of this process, and of the second one or of those that ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = own.ru_utime + ended.ru_utime, own.ru_stime + ended.ru_stime
    if second is not None and second.pid is not None:
        fields = Path(f"/proc/{second.pid}/stat").read_text().rpartition(")")[2].split()
        per_second = os.sysconf("SC_CLK_TCK")
        user, system = user + int(fields[11]) / per_second, system + int(fields[12]) / per_second
    return user, system


def measure_training(
    model: nn.Module, choice: ScorerChoice, pairs: Sequence[TokenizedPair], way: Way
) -> Seconds:
    """Return the time of the gradients of all pairs."""
    starts = range(0, len(pairs), PAIRS_PER_PASS)
    parts = [pairs[start : start + PAIRS_PER_PASS] for start in starts]
    zeros = mx.zeros((PAIRS_PER_PASS,))
    batches = [MicroBatch.of(part, PairLogps(zeros, zeros)) for part in parts]
    openblas.set_num_threads(way.threads)
    with_second = way.passes_at_once > 1
    process = make_second_process(model, OBJECTIVE, choice.scorer) if with_second else None

    def step() -> None:
        loss_and_gradients(model, OBJECTIVE, batches, scorer=choice.scorer, second=process)

    with process or nullcontext(), memory_efficient_training(model, recompute=False):
        step()
        return timed(step, process)


def measure_scoring(
    model: nn.Module, choice: ScorerChoice, pairs: Sequence[TokenizedPair], way: Way
) -> Seconds:
    """Return the time of the log-probs of all pairs; the second process starts in this time."""
    openblas.set_num_threads(way.threads)

    def score() -> None:
        score_pairs(
            model,
            [*pairs] * PASSES_AT_ONCE,
            limit=PassLimit(pairs=PAIRS_PER_PASS),
            scorer=choice.forward_only,
            cost=choice.cost,
            processes=Processes(way.passes_at_once),
        )

    return timed(score, None)


KINDS = {"training": measure_training, "reference": measure_scoring}


def measure(options: argparse.Namespace) -> list[tables.Row]:
    """Measure all ways in alternation; return one row per kind of pass and way."""
    shape = SHAPES[options.shape]
    mx.random.seed(SEED)
    model = steps.build(shape)
    choice = select_scorer(model, vocab_size=shape.vocab_size)
    pairs = draw_pairs(shape.vocab_size)
    rows = []
    for kind, function in KINDS.items():
        num_pairs = len(pairs) * (1 if kind == "training" else PASSES_AT_ONCE)
        runs: dict[Way, list[Seconds]] = {way: [] for way in WAYS}
        for _ in range(options.repeats):
            for way, seconds in runs.items():
                seconds.append(function(model, choice, pairs, way))
        for way, seconds in runs.items():
            wall, user, system = (
                statistics.median(values) for values in zip(*seconds, strict=True)
            )
            values = {"wall_s": wall, "user_s": user, "system_s": system}
            numbers = values | {"pairs_per_s": num_pairs / wall}
            row = {"shape": options.shape, "pass": kind, "way": way.name}
            rows.append(row | {name: f"{value:.2f}" for name, value in numbers.items()})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement."""
    try:
        options = parse(arguments)
        threads = openblas.num_threads()
        try:
            with limited_buffers():
                rows = measure(options)
        finally:
            openblas.set_num_threads(threads)
        tables.append_csv(options.csv, [machine.describe_machine() | row for row in rows])
        print(tables.text_table(rows, COLUMNS))
    except DPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
