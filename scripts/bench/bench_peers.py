"""Time and memory of DPO trainers on the same model, pairs, adapters and dtype.

    python -m scripts.bench.bench_peers --pairs FILE             pairs per second, real pairs
    python -m scripts.bench.bench_peers --pairs FILE --long      pairs per second, long pairs
    python -m scripts.bench.bench_peers --pairs FILE --ranked    4 completions a prompt, all 6 pairs
    python -m scripts.bench.bench_peers --pairs FILE --system    one long system prompt in all
    python -m scripts.bench.bench_peers --pairs FILE --memory    peak of one step over one long pair

Every trainer runs in its own process and virtual environment, which the first call creates. Its
settings are compared on a few pairs, and the fastest runs over all of them. docs/performance.md
describes what is measured, and how.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX
from mlx_dpo.errors import DPOError

# isort: split
from scripts.bench import machine, processes, tables
from scripts.bench.options import parse, settings
from scripts.bench.processes import PeerError
from scripts.bench.session import Candidate, Session
from scripts.bench.tables import Measurement
from scripts.bench.trainers import TRAINERS
from scripts.bench.workload import Workload, make_workload, sample_pairs

BUSY_LOAD_PER_CORE = 0.5  # above, speeds mean little
SPEED_COLUMNS = (
    "trainer",
    "setting",
    "first_epoch_pairs_per_s",
    "cached_epoch_pairs_per_s",
    "user_s",
    "system_s",
    "peak_gb",
)
MEMORY_COLUMNS = ("trainer", "setting", "peak_gb", "resident_gb", "remark")


def install_trainers(options: argparse.Namespace, session: Session) -> dict[str, Path]:
    """Return the Python of every trainer that could be installed."""
    found = {}
    for name in options.peers:
        try:
            own = options.trl_python if name == "trl" else None
            found[name] = own or processes.trainer_python(TRAINERS[name], options.cache)
        except PeerError as error:
            session.fail(error)
    return found


def select_settings(
    session: Session, options: argparse.Namespace, work: Workload, candidates: list[Candidate]
) -> list[Candidate]:
    """Return the settings of one trainer that are fastest on a few pairs, by either rate."""
    if len(candidates) == 1:
        return candidates
    few = sample_pairs(work, min(options.search, work.count))
    tried = [m for candidate in candidates for m in session.measure(candidate, few, stage="search")]
    names = tables.fastest_settings(tried)
    return [candidate for candidate in candidates if candidate.setting.name in names]


def measure_speed(
    session: Session, options: argparse.Namespace, work: Workload, trainers: list[list[Candidate]]
) -> list[Measurement]:
    """Measure every trainer in its best settings, in rounds of alternating order."""
    candidates = [
        candidate
        for group in trainers
        for candidate in select_settings(session, options, work, group)
    ]
    return [
        measured
        for turn in range(options.repeats)
        for candidate in (candidates if turn % 2 == 0 else reversed(candidates))
        for measured in session.measure(candidate, work, stage="run", turn=turn)
    ]


def measure_memory(
    session: Session, work: Workload, trainers: list[list[Candidate]]
) -> list[Measurement]:
    """Measure every trainer in each of its settings."""
    candidates = [candidate for group in trainers for candidate in group]
    return [m for c in candidates for m in session.measure(c, work, stage="memory")]


def report(session: Session, measured: Sequence[Measurement]) -> None:
    """Print the table, the speed-ups of this project, and whether all did the same work."""
    of_memory = session.kind == "memory"
    rows = [row for row in session.rows if row["stage"] != "search"]
    print(tables.text_table(rows, MEMORY_COLUMNS if of_memory else SPEED_COLUMNS))
    for epoch, rate in {} if of_memory else tables.EPOCHS.items():
        for trainer, ratio in tables.speedups(measured, rate).items():
            print(f"ours / {trainer} {epoch}: {ratio:.2f}")
    work = sorted({(m.result.pairs, m.result.tokens, m.result.trainable) for m in measured})
    print("pairs, tokens and adapter weights: " + "; ".join(f"{a}, {b}, {c}" for a, b, c in work))
    if len(work) > 1:
        print(
            "the trainers did not do the same work: speed-ups are not comparable", file=sys.stderr
        )


def run_benchmark(options: argparse.Namespace, scratch: Path) -> Session:
    """Prepare the workload, run the trainers on it, and report."""
    session = Session(
        shape=options.shape,
        kind=options.kind,
        threads=options.threads,
        timeout=options.timeout,
        csv=options.csv,
        scratch=scratch,
    )
    work = make_workload(
        options.pairs,
        shape=options.shape,
        kind=options.kind,
        count=options.pairs_count,
        cache=options.cache,
        folder=scratch,
    )
    if work.faulty:
        print(f"{options.pairs}: {work.faulty} faulty rows are skipped", file=sys.stderr)
    trainers = [
        [Candidate(TRAINERS[name], setting, python) for setting in settings(options, name)]
        for name, python in install_trainers(options, session).items()
    ]
    if options.kind == "memory":
        report(session, measure_memory(session, work, trainers))
    else:
        report(session, measure_speed(session, options, work, trainers))
    return session


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a trainer failed, 2 if it cannot begin."""
    try:
        options = parse(arguments, __doc__ or "")
        facts = machine.describe_machine()
        if float(facts["load"]) > BUSY_LOAD_PER_CORE * int(facts["cores"]):
            warning = f"the machine is busy (load {facts['load']}): speeds are not reliable"
            print(warning, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            session = run_benchmark(options, Path(folder))
    except DPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 1 if session.failures else 0


if __name__ == "__main__":
    sys.exit(main())
