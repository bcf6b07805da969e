"""Pairs per second of several ranks on this machine, against one rank, in paired runs.

    python -m scripts.bench.ranks --pairs FILE                     about eight minutes on two cores
    python -m scripts.bench.ranks --pairs FILE --before OLD        with an older checkout, too
    python -m scripts.bench.ranks --rounds 1 --steps 3             a try in a minute

Each run is `mlx-dpo train` in processes of its own, with passes of the same size: one rank with one
thread of OpenBLAS; one rank with a thread per core; several ranks with one thread each. The ways
alternate. The first step of a run is not timed. With --pairs the model has random weights, about
17 million, and a tokenizer made for these pairs; otherwise it is the shipped one with its pairs.

A figure is the median over the rounds, a ratio the median of the ratios within a round. The run
fails if the ways end with different adapters. A row per way is appended to docs/bench/ranks.csv,
with the load before each of its runs.
"""

import argparse
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX
from mlx_dpo.errors import DataError, DPOError
from mlx_dpo.paths import CACHE_VARIABLE
from mlx_dpo.profiling.bench.shapes import Shape
from mlx_dpo.reporting.metrics_log import read_metrics
from scripts.bench import machine, tables, texts
from scripts.bench.shapes import write_checkpoint
from scripts.bench.tables import Row

CSV = machine.ROOT / "docs" / "bench" / "ranks.csv"
SHIPPED = machine.ROOT / "models" / "tiny-chat"
SHAPE = Shape(
    hidden_size=384,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=6,
    intermediate_size=1024,
    vocab_size=4096,
)
BATCH_SIZE, PAIRS_PER_PASS = 8, 2  # four passes per step
PROGRAM = "import sys; del sys.argv[0]; from mlx_dpo.cli import main; main()"
ONE_THREAD, ALL_THREADS = "one rank, one thread", "one rank, all threads"
COLUMNS = (
    "way", "pairs_per_s", "lowest", "highest", "ratio_to_one_thread", "ratio_to_all_threads",
    "ratio_to_before", "loads", "command_s",
)  # fmt: skip


class Way(NamedTuple):
    """A way to start the run: checkout, ranks, and threads of OpenBLAS per rank."""

    name: str
    tree: Path
    ranks: int
    threads: int


@dataclass(frozen=True)
class Run:
    """What was measured of one run."""

    pairs_per_s: float
    command_s: float  # of the whole command
    load: float  # before the run
    adapters: str  # digest


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="ranks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=Path, help="a file of pairs, for a model with random weights")
    add("--ranks", type=int, default=2, help="ranks to measure (default: 2)")
    add("--rounds", type=int, default=5, help="runs of each way (default: 5)")
    add("--steps", type=int, default=4, help="steps of a run; the first is not timed (default: 4)")
    add("--before", type=Path, help="an older checkout, measured with one rank")
    add("--csv", type=Path, default=CSV, help="file to append rows to")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.ranks < 2 or options.rounds < 1:
        parser.error("needs at least 2 steps, 2 ranks and 1 round")
    return options


def ways_to_run(ranks: int, before: Path | None) -> list[Way]:
    """Return the ways in the order in which they alternate."""
    cores = os.cpu_count() or 1
    own = machine.ROOT
    ways = [
        Way(ONE_THREAD, own, 1, 1),
        Way(f"{ranks} ranks, one thread each", own, ranks, 1),
        Way(ALL_THREADS, own, 1, cores),
    ]
    if before is not None:
        ways.insert(1, Way(f"before: {ONE_THREAD}", before, 1, 1))
        ways.append(Way(f"before: {ALL_THREADS}", before, 1, cores))
    return ways


def make_workload(source: Path | None, count: int, folder: Path) -> list[str]:
    """Return the arguments of `mlx-dpo train` for the pairs and the model.

    Raises:
        DataError: `source` cannot be read, or has fewer pairs than `count`.
    """
    if source is None:
        return [str(SHIPPED / "preferences" / "train.jsonl"), "--model", str(SHIPPED)]
    pairs, _ = texts.read_pairs(source)
    if len(pairs) < count:
        raise DataError(f"{source}: has {len(pairs)} usable pairs; give fewer --steps")
    tokenizer = texts.train_tokenizer(pairs, SHAPE.vocab_size)
    texts.write_tokenizer(folder / "tokenizer", tokenizer)
    write_checkpoint(folder / "model", SHAPE, folder / "tokenizer")
    texts.write_pairs(folder / "pairs.jsonl", pairs[:count])
    model = ["--model", str(folder / "model"), "--chat-template", "text"]
    return [str(folder / "pairs.jsonl"), *model]


def run(way: Way, command: Sequence[str], steps: int, folder: Path) -> Run:
    """Train once in processes of their own.

    Raises:
        DataError: the run failed.
    """
    own = way.tree.absolute() / ".venv" / "bin" / "python"
    program = [str(own if own.exists() else sys.executable), "-P", "-c", PROGRAM, "mlx-dpo"]
    caches = folder / f"caches-{way.tree.resolve().name}"
    caches.mkdir(mode=0o700, exist_ok=True)
    load, began = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        output = Path(name) / "run"
        flags = {
            "--output": str(output),
            "--max-steps": str(steps),
            "--batch-size": str(BATCH_SIZE),
            "--micro-batch-size": str(PAIRS_PER_PASS),
            "--learning-rate": "1e-4",
            "--valid-fraction": "0",
        } | ({"--ranks": str(way.ranks)} if way.ranks > 1 else {})
        done = subprocess.run(
            [*program, "train", *command, *(word for flag in flags.items() for word in flag)],
            env=os.environ
            | {
                "PYTHONPATH": str(way.tree.absolute()),
                CACHE_VARIABLE: str(caches),
                "OPENBLAS_NUM_THREADS": str(way.threads),
            },
            cwd=name,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise DataError(f"{way.name}: exit status {done.returncode}\n{done.stderr}")
        took = time.perf_counter() - began
        digest = hashlib.sha256((output / "adapters.safetensors").read_bytes()).hexdigest()
        return Run(pairs_per_second(read_metrics(output / "metrics.jsonl")), took, load, digest)


def pairs_per_second(rows: Sequence[Mapping[str, float]]) -> float:
    """Return the speed of the steps after the first, from the rows of `metrics.jsonl`."""
    steps = [row for row in rows if "loss" in row]
    seconds = sum(
        (row["num_tokens"] - before["num_tokens"]) / row["tokens_per_second"]
        for before, row in itertools.pairwise(steps)
    )
    return BATCH_SIZE * (len(steps) - 1) / seconds


def median_ratio(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """Return the median of the ratios of two ways within a round."""
    pairs = zip(runs, others, strict=True)
    return f"{median(one.pairs_per_s / other.pairs_per_s for one, other in pairs):.3f}"


def rows_of(runs: Mapping[Way, Sequence[Run]], workload: str) -> list[Row]:
    """Return a row per way."""
    by_name = {way.name: found for way, found in runs.items()}
    rows = []
    for way, found in runs.items():
        speeds = [one.pairs_per_s for one in found]
        before = by_name.get(f"before: {way.name}")
        rows.append(
            {
                "workload": workload,
                "way": way.name,
                "rounds": str(len(found)),
                "pairs_per_s": tables.format_number(median(speeds)),
                "lowest": tables.format_number(min(speeds)),
                "highest": tables.format_number(max(speeds)),
                "ratio_to_one_thread": median_ratio(found, by_name[ONE_THREAD]),
                "ratio_to_all_threads": median_ratio(found, by_name[ALL_THREADS]),
                "ratio_to_before": "" if before is None else median_ratio(found, before),
                "loads": " ".join(f"{one.load:.1f}" for one in found),
                "command_s": tables.format_number(median(one.command_s for one in found)),
            }
        )
    return rows


def check_adapters(runs: Mapping[Way, Sequence[Run]]) -> None:
    """Check that all runs ended with the same adapters.

    Raises:
        DataError: they did not.
    """
    by_digest: dict[str, list[str]] = {}
    for way, found in runs.items():
        for one in found:
            names = by_digest.setdefault(one.adapters, [])
            names += [way.name] * (way.name not in names)
    if len(by_digest) > 1:
        groups = "; ".join(" and ".join(names) for names in by_digest.values())
        raise DataError(f"the ways ended with different adapters: {groups}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    began = time.perf_counter()
    ways = ways_to_run(options.ranks, options.before)
    runs: dict[Way, list[Run]] = {way: [] for way in ways}
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = make_workload(options.pairs, BATCH_SIZE * options.steps, folder)
            for number in range(options.rounds):
                for way in ways:
                    runs[way].append(run(way, command, options.steps, folder))
                    speed, load = runs[way][-1].pairs_per_s, runs[way][-1].load
                    print(
                        f"round {number + 1}: {way.name}: {speed:.3g} pairs/s, load {load:.1f}",
                        file=sys.stderr,
                    )
        source = "shipped" if options.pairs is None else options.pairs.stem
        workload = f"{source}, {options.steps} steps of {BATCH_SIZE}"
        rows = rows_of(runs, workload)
        tables.append_csv(options.csv, [machine.describe_machine() | row for row in rows])
        print(tables.text_table(rows, COLUMNS))
        check_adapters(runs)
    except DPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"all adapters are equal; {time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
