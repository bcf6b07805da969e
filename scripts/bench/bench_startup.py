"""Time from the command `mlx-dpo train` to the end of the first step, by the program's phases.

    python -m scripts.bench.bench_startup                            the shipped model and its pairs
    python -m scripts.bench.bench_startup --tree OLD --tree .        two checkouts, alternating
    python -m scripts.bench.bench_startup --pairs PAIRS              SmolLM2-135M's shape, 64 pairs
    python -m scripts.bench.bench_startup --second                   with filled caches

Each start is a process of its own with empty caches; `--second` keeps the caches that a first start
has filled. Seconds of each phase are medians over the rounds, as CPU seconds (user and system) and
on the wall; `other` is what the program does between its phases. A row per phase is appended to
docs/bench/startup.csv.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from mlx_dpo.errors import DataError
from mlx_dpo.paths import CACHE_VARIABLE, cache_folder
from mlx_dpo.profiling.bench.shapes import SHAPES
from scripts.bench import machine, tables
from scripts.bench.tables import Row
from scripts.bench.workload import make_workload

CSV = machine.ROOT / "docs" / "bench" / "startup.csv"
MODEL = machine.ROOT / "models" / "tiny-chat"
CLOCK = Path(__file__).with_name("startup_clock.py")
IMPORTS, OTHER, STEP, TOTAL = "Importing", "other", "Taking step 1", "total"


class Seconds(NamedTuple):
    """Seconds of a part of a start."""

    wall: float
    user: float
    system: float

    def minus(self, other: "Seconds") -> "Seconds":
        """Return the difference to `other`."""
        return Seconds(*(a - b for a, b in zip(self, other, strict=True)))

    def plus(self, other: "Seconds") -> "Seconds":
        """Return the sum with `other`."""
        return Seconds(*(a + b for a, b in zip(self, other, strict=True)))


ZERO = Seconds(0.0, 0.0, 0.0)
Parts = dict[str, Seconds]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_startup", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--tree", type=Path, action="append", help="a checkout to measure (default: this one)")
    add("--pairs", type=Path, help="a file of pairs, for a model with random weights")
    add("--pairs-count", type=int, default=64, help="pairs of that file (default: 64)")
    add("--kind", choices=("short", "long"), default="short", help="the pairs, or long ones")
    add("--shape", choices=SHAPES, default="smollm2-135m", help="shape of that model")
    add("--second", action="store_true", help="measure a start whose caches are filled")
    add("--rounds", type=int, default=3, help="starts of each checkout (default: 3)")
    add("--cache", type=Path, default=(cache_folder() or Path(".")) / "bench", help="models")
    add("--csv", type=Path, default=CSV, help="file to append rows to")
    add("flags", nargs="*", help="further flags of `mlx-dpo train`, after `--`")
    return parser.parse_args(arguments)


def start(tree: Path, command: Sequence[str], caches: Path) -> Parts:
    """Start a run of a checkout in a new process; return the seconds of each part.

    Raises:
        DataError: the run failed before its first step.
    """
    own = tree.absolute() / ".venv" / "bin" / "python"
    with tempfile.TemporaryDirectory() as name:
        events = Path(name) / "events.json"
        program = [str(own if own.exists() else sys.executable), "-P", str(CLOCK)]
        output = ["--output", str(Path(name) / "run")]
        began = time.time()
        done = subprocess.run(
            [*program, str(events), repr(began), "train", *command, *output],
            env=os.environ | {"PYTHONPATH": str(tree.absolute()), CACHE_VARIABLE: str(caches)},
            cwd=name,
            capture_output=True,
            text=True,
            check=False,
        )
        if not events.exists():
            raise DataError(f"{tree}: no first step (exit status {done.returncode})\n{done.stderr}")
        return split_into_parts(json.loads(events.read_text()))


def split_into_parts(events: Sequence[tuple[str, str, float, float, float]]) -> Parts:
    """Return the seconds of each phase, of the imports before the first, of step 1 and the rest.

    Phases inside others count for the inner one only.
    """
    parts: Parts = {}
    open_titles: list[str] = []
    last = ZERO
    for kind, title, *times in events:
        now = Seconds(*times)
        if title == "step 1":
            part = STEP
        elif not parts and not open_titles:
            part = IMPORTS
        else:
            part = open_titles[-1] if open_titles else OTHER
        parts[part] = parts.get(part, ZERO).plus(now.minus(last))
        last = now
        if kind == "begin":
            open_titles.append(_general(title))
        elif open_titles:
            open_titles.pop()
    return parts | {TOTAL: last}


def _general(title: str) -> str:
    """Return a phase's title without the names of files and models in it."""
    words = title.split()
    return " ".join(words[:2]) if words[0] == "Loading" else " ".join(words[:3])


def medians(runs: Sequence[Parts]) -> Parts:
    """Return the medians of each part over the runs; a part that a run lacks counts as zero."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: Seconds(*(median(run.get(name, ZERO)[at] for run in runs) for at in range(3)))
        for name in names
    }


def rows_of(tree: Path, workload: str, parts: Parts) -> list[Row]:
    """Return a row for each part of a checkout's start."""
    return [
        {
            "tree": tree.resolve().name,
            "workload": workload,
            "part": name,
            "cpu_s": f"{seconds.user + seconds.system:.2f}",
            "user_s": f"{seconds.user:.2f}",
            "system_s": f"{seconds.system:.2f}",
            "wall_s": f"{seconds.wall:.2f}",
        }
        for name, seconds in parts.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    trees = options.tree or [machine.ROOT]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command, workload = [str(MODEL / "preferences"), "--model", str(MODEL)], "tiny-chat"
        if options.pairs is not None:
            work = make_workload(
                options.pairs,
                shape=options.shape,
                kind=options.kind,
                count=options.pairs_count,
                cache=options.cache,
                folder=folder,
            )
            command = [str(work.pairs), "--model", str(work.model)]
            workload = f"{options.shape}, {work.count} {options.kind}"
        workload += ", second" * options.second
        runs: dict[Path, list[Parts]] = {tree: [] for tree in trees}
        for number in range(options.rounds):
            for tree in trees:
                caches = folder / f"{trees.index(tree)}-{0 if options.second else number}"
                caches.mkdir(mode=0o700, exist_ok=True)
                if options.second and not number:
                    start(tree, [*command, *options.flags], caches)
                runs[tree].append(start(tree, [*command, *options.flags], caches))
                total = runs[tree][-1][TOTAL]
                print(f"{tree}: {total.user:.2f} user, {total.wall:.2f} wall", file=sys.stderr)
    rows = [row for tree in trees for row in rows_of(tree, workload, medians(runs[tree]))]
    tables.append_csv(options.csv, [machine.describe_machine() | row for row in rows])
    print(tables.text_table(rows, tuple(rows[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
