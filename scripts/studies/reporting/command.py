"""The command line of a study: run it, print its claims with their numbers, write its rows."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from mlx_dpo.paths import CACHE_VARIABLE
from scripts.bench import machine
from scripts.studies.reporting import csv_rows
from scripts.studies.reporting.formats import format_bound, format_number, strip_markdown
from scripts.studies.reporting.study import Finding, Row, Rows, Scale, Study, check_claims

SEEDS = (0, 1, 2)


def main(study: Study) -> None:
    """Run the command line of a study."""

    @click.command(help=strip_markdown(f"{study.title}. {study.question}"))
    @click.option("--quick", is_flag=True, help="One seed and fewer settings, under a minute.")
    @click.option("--seeds", help="Seeds, as 0,1,2.  [default: 0,1,2; 0 with --quick]")
    @click.option(
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for the rows as CSV.  [default: docs/evidence; none with --quick]",
    )
    def command(quick: bool, seeds: str | None, output: Path | None) -> None:
        chosen = tuple(map(int, seeds.split(","))) if seeds else SEEDS[: 1 if quick else None]
        rows, facts = run_study(study, quick=quick, seeds=chosen, verbose=True)
        findings = list(check_claims(study, rows, quick=quick))
        print_findings(findings)
        print(f"{study.name}: {facts['seconds']} s, load {facts['load']} before")
        if folder := output or (None if quick else csv_rows.FOLDER):
            csv_rows.write_rows(folder / f"{study.name}.csv", rows)
            csv_rows.record_run(folder / csv_rows.RUNS.name, facts)
        sys.exit(not all(finding.holds for finding in findings))

    command()


def run_study(
    study: Study, *, quick: bool, seeds: Sequence[int], verbose: bool = False
) -> tuple[Rows, Row]:
    """Run a study in a temporary folder; return its rows as written, and the facts of the run."""
    load = f"{os.getloadavg()[0]:.1f}"
    facts: Row = {
        "study": study.name,
        "form": "quick" if quick else "full",
        "seeds": " ".join(map(str, seeds)),
        **machine.describe_machine(),
        "load": load,
        "versions": machine.versions("mlx", "mlx-lm", "numpy"),
    }
    start, rows = time.monotonic(), []
    with TemporaryDirectory(prefix="study-") as folder:
        # No log-probs of other code, and none for the user's other runs.
        os.environ[CACHE_VARIABLE] = str(Path(folder) / "cache")
        for row in study.run(Scale(quick, tuple(seeds), Path(folder))):
            rows.append(row)
            if verbose and sys.stderr.isatty():
                print(" ".join(f"{k}={v}" for k, v in row.items())[:160], file=sys.stderr)
    facts["seconds"] = round(time.monotonic() - start)
    facts["cpu_seconds"] = round(sum(os.times()[:4]))
    facts["peak_mb"] = round(machine.peak_resident_bytes() / 1e6)
    return csv_rows.as_written(rows), facts


def print_findings(findings: Sequence[Finding]) -> None:
    """Print one line per claim: whether it holds, its numbers, its bound and its text."""
    for finding in findings:
        claim = finding.claim
        numbers = ", ".join(map(format_number, finding.values))
        verdict = "holds" if finding.holds else "FAILS"
        print(f"{verdict}  {claim.name}: {numbers}; bound {format_bound(claim)}")
        print(f"       {strip_markdown(claim.text)}")
