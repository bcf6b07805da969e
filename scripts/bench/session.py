"""State of a `bench_peers.py` run: every result is printed and written as soon as it is there."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scripts.bench import machine, processes, tables
from scripts.bench.job import Job, Result
from scripts.bench.processes import PeerError
from scripts.bench.tables import Measurement, Row
from scripts.bench.trainers import Setting, Trainer
from scripts.bench.workload import Workload

STEP_PAIRS = 16  # pairs per optimizer step, or all if there are fewer


class Candidate(NamedTuple):
    """A trainer in one setting, and the Python of its environment."""

    trainer: Trainer
    setting: Setting
    python: Path


@dataclass
class Session:
    """Options shared by all runs, and their results."""

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
    ) -> list[Measurement]:
        """Measure one run; return an empty list if it failed."""
        facts = machine.describe_machine()
        try:
            result = self._run(candidate, work)
        except PeerError as error:
            self.fail(error)
            return []
        trainer, setting, _ = candidate
        measured = Measurement(
            trainer=trainer.name,
            setting=setting.name,
            round=turn,
            result=result,
            remark=setting.remark,
        )
        context = {"shape": self.shape, "kind": self.kind, "stage": stage}
        row = facts | context | {"threads": str(self.threads)} | tables.peer_row(measured)
        tables.append_csv(self.csv, [row])
        self.rows.append(row)
        print(tables.progress_line(row), file=sys.stderr)
        return [measured]

    def _run(self, candidate: Candidate, work: Workload) -> Result:
        """Run one candidate on the workload."""
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
        """Print an error and record it for the exit status."""
        self.failures.append(error)
        print(f"Error: {error}", file=sys.stderr)
