"""Time and memory of DPO trainers on the same model, pairs, adapters and number type.

    python -m scripts.bench.bench_peers --pairs FILE             pairs per second, real pairs
    python -m scripts.bench.bench_peers --pairs FILE --long      pairs per second, long pairs
    python -m scripts.bench.bench_peers --pairs FILE --memory    peak of one step over one long pair

Every trainer runs in processes of its own, from an environment that is made for it on the first
call. Its settings are tried on a few of the pairs and its fastest one runs over all of them.
docs/performance.md says what is measured, and how.
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
from scripts.bench.tables import Measured
from scripts.bench.trainers import TRAINERS
from scripts.bench.workload import Workload, sample, workload

BUSY = 0.5  # load, per core, above which figures say little
SPEED = ("trainer", "setting", "first_epoch_pairs_per_s", "cached_epoch_pairs_per_s", "peak_gb")
MEMORY = ("trainer", "setting", "peak_gb", "resident_gb", "remark")


def installed(options: argparse.Namespace, session: Session) -> dict[str, Path]:
    """The Python of every trainer that could be installed."""
    found = {}
    for name in options.peers:
        try:
            own = options.trl_python if name == "trl" else None
            found[name] = own or processes.python_of(TRAINERS[name], options.cache)
        except PeerError as error:
            session.fail(error)
    return found


def best(
    session: Session, options: argparse.Namespace, work: Workload, candidates: list[Candidate]
) -> list[Candidate]:
    """The candidates of one trainer that are fastest on a few pairs, by either rate."""
    if len(candidates) == 1:
        return candidates
    few = sample(work, min(options.search, work.count))
    tried = [m for one in candidates for m in session.measure(one, few, stage="search")]
    names = tables.fastest(tried)
    return [one for one in candidates if one.setting.name in names]


def speed(
    session: Session, options: argparse.Namespace, work: Workload, trainers: list[list[Candidate]]
) -> list[Measured]:
    """Every trainer in its best settings, in rounds, every second one backwards."""
    chosen = [one for each in trainers for one in best(session, options, work, each)]
    return [
        measured
        for turn in range(options.repeats)
        for one in (chosen if turn % 2 == 0 else reversed(chosen))
        for measured in session.measure(one, work, stage="run", turn=turn)
    ]


def memory(session: Session, work: Workload, trainers: list[list[Candidate]]) -> list[Measured]:
    """Every trainer in each of its settings."""
    every = [one for each in trainers for one in each]
    return [m for one in every for m in session.measure(one, work, stage="memory")]


def report(session: Session, measured: Sequence[Measured]) -> None:
    """The table, how many times as fast this project is, and whether all did the same work."""
    of_memory = session.kind == "memory"
    rows = [row for row in session.rows if row["stage"] != "search"]
    print(tables.text_table(rows, MEMORY if of_memory else SPEED))
    for epoch, rate in {} if of_memory else tables.EPOCHS.items():
        for trainer, ratio in tables.ratios(measured, rate).items():
            print(f"ours / {trainer} {epoch}: {ratio:.2f}")
    work = sorted({(m.result.pairs, m.result.tokens, m.result.trainable) for m in measured})
    print("pairs, tokens and adapter weights: " + "; ".join(f"{a}, {b}, {c}" for a, b, c in work))
    if len(work) > 1:
        print("the trainers did not do the same work; read no ratio from this", file=sys.stderr)


def compare(options: argparse.Namespace, scratch: Path) -> Session:
    """Prepare the work, run the trainers on it, and report."""
    session = Session(
        shape=options.shape,
        kind=options.kind,
        threads=options.threads,
        timeout=options.timeout,
        csv=options.csv,
        scratch=scratch,
    )
    work = workload(
        options.pairs,
        shape=options.shape,
        kind=options.kind,
        count=options.pairs_count,
        cache=options.cache,
        folder=scratch,
    )
    if work.faulty:
        print(f"{options.pairs}: {work.faulty} faulty rows are passed over", file=sys.stderr)
    trainers = [
        [Candidate(TRAINERS[name], setting, python) for setting in settings(options, name)]
        for name, python in installed(options, session).items()
    ]
    if options.kind == "memory":
        report(session, memory(session, work, trainers))
    else:
        report(session, speed(session, options, work, trainers))
    return session


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a trainer failed, 2 if it cannot begin."""
    try:
        options = parse(arguments, __doc__ or "")
        facts = machine.facts()
        if float(facts["load"]) > BUSY * int(facts["cores"]):
            said = f"the machine is busy (load {facts['load']}): read no speed from this"
            print(said, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            session = compare(options, Path(folder))
    except DPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 1 if session.failures else 0


if __name__ == "__main__":
    sys.exit(main())
