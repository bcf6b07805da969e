"""A call of `bench_peers.py` under way: every result is printed and written down as it comes."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scripts.bench import machine, processes, tables
from scripts.bench.job import Job, Result
from scripts.bench.processes import PeerError
from scripts.bench.tables import Measured, Row
from scripts.bench.trainers import Setting, Trainer
from scripts.bench.workload import Workload

STEP_PAIRS = 16  # pairs per optimizer step, or all there are


class Candidate(NamedTuple):
    """A trainer in one setting, and the Python that has it."""

    trainer: Trainer
    setting: Setting
    python: Path


@dataclass
class Session:
    """What does not change between runs, and what came of them."""

    shape: str
    kind: str
    threads: int
    timeout: float
    csv: Path
    scratch: Path
    rows: list[Row] = field(default_factory=list)
    failures: list[PeerError] = field(default_factory=list)

    def measure(
        self, candidate: Candidate, work: Workload, *, stage: str, turn: int = 0
    ) -> list[Measured]:
        """One run; nothing if it failed."""
        facts = machine.facts()
        try:
            result = self._run(candidate, work)
        except PeerError as error:
            self.fail(error)
            return []
        trainer, setting, _ = candidate
        measured = Measured(
            trainer=trainer.name,
            setting=setting.name,
            round=turn,
            result=result,
            remark=setting.remark,
        )
        about = {"shape": self.shape, "kind": self.kind, "stage": stage}
        row = facts | about | {"threads": str(self.threads)} | tables.peer_row(measured)
        tables.append_csv(self.csv, [row])
        self.rows.append(row)
        print(tables.sentence(row), file=sys.stderr)
        return [measured]

    def _run(self, candidate: Candidate, work: Workload) -> Result:
        job = Job(
            model=str(work.model),
            pairs=str(work.pairs),
            threads=self.threads,
            step_pairs=min(STEP_PAIRS, work.count),
        )
        return processes.run(
            candidate.trainer,
            candidate.setting,
            job,
            python=candidate.python,
            folder=self.scratch / "run",
            timeout=self.timeout,
        )

    def fail(self, error: PeerError) -> None:
        """Say it now, and remember it for the exit status."""
        self.failures.append(error)
        print(f"Error: {error}", file=sys.stderr)
