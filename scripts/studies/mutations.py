"""Break the package in twelve ways, and see which claims of which studies fail.

    python -m scripts.studies.mutations [--study NAME]... [--mutation NAME]... [--all]

Each mutation replaces text of the package in a copy of the checkout; the quick form of studies
runs there. A mutation is found if a claim fails; a crash is not a find.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import click

from scripts.bench.machine import commit
from scripts.studies import NAMES
from scripts.studies.reporting import csv_rows
from scripts.studies.reporting.study import Row

COPIED = ("mlx_dpo", "scripts", "models", "examples")
UNCHANGED = "none"  # the control: the copy without a mutation
TIMEOUT = 600  # seconds


class Edit(NamedTuple):
    """Text of a file of the package, which is there once, and what replaces it."""

    file: str
    before: str
    after: str


class Mutation(NamedTuple):
    """A fault: its edits, and the studies whose quick form has to find it."""

    name: str
    breaks: str  # loss, mask, reference or β
    what: str
    edits: tuple[Edit, ...]
    studies: tuple[str, ...] = ("optimum",)


PAIRWISE, RATIOS = "mlx_dpo/losses/pairwise.py", "mlx_dpo/losses/log_ratios.py"
OBJECTIVE = "mlx_dpo/training/objective.py"
# The sums of a completion's log-probs: of the scorers that share prompts, and of the plain one.
SHARED_SUM = ("mlx_dpo/scoring/scorers.py", "        return logps.sum(axis=0)\n")
PLAIN_SUM = (
    "mlx_dpo/scoring/logps.py",
    "    return mx.where(scored, logps, 0.0).sum(axis=-1)\n\n\ndef _within_shorter",
)
LOG_RATIO = "policy.chosen - reference.chosen, policy.rejected - reference.rejected"
# The first function of pairwise.py; the next one has the first of these lines too.
SIGMOID = (
    "    x = beta * margin - offset\n"
    "    correct = -nn.log_sigmoid(x)\n"
    "    flipped = -nn.log_sigmoid(-x)\n"
)


def _sigmoid(old: str, new: str) -> tuple[Edit, ...]:
    return (Edit(PAIRWISE, SIGMOID, SIGMOID.replace(old, new)),)


def _log_ratio(chosen: str, rejected: str) -> tuple[Edit, ...]:
    return (Edit(RATIOS, LOG_RATIO, f"{chosen}, {rejected}"),)


def _sums(shared: str, plain: str) -> tuple[Edit, ...]:
    return (
        Edit(*SHARED_SUM, f"        return {shared}\n"),
        Edit(*PLAIN_SUM, f"    return {plain}\n\n\ndef _within_shorter"),
    )


MUTATIONS = (
    Mutation(
        "exchanged",
        "loss",
        "Chosen and rejected are exchanged.",
        _sigmoid("x = beta * margin", "x = -beta * margin"),
    ),
    Mutation(
        "no_log",
        "loss",
        "The loss is 1 − σ(x) instead of −log σ(x).",
        _sigmoid("-nn.log_sigmoid(x)", "1 - mx.sigmoid(x)"),
    ),
    Mutation(
        "no_weights",
        "loss",
        "The weights of rows are ignored.",
        (Edit(OBJECTIVE, "scored.metadata.weights * scored.on_policy", "scored.on_policy"),),
    ),
    Mutation(
        "no_end",
        "mask",
        "The end of the answer is not scored.",
        _sums(
            "logps[:-1].sum(axis=0)",
            "mx.where(scored[:, ::-1].cumsum(axis=-1)[:, ::-1] > 1, logps, 0.0).sum(axis=-1)",
        ),
    ),
    Mutation(
        "no_first",
        "mask",
        "The first token of the answer is not scored.",
        _sums(
            "logps[1:].sum(axis=0)",
            "mx.where(scored & (scored.cumsum(axis=-1) > 1), logps, 0.0).sum(axis=-1)",
        ),
    ),
    Mutation(
        "averaged",
        "mask",
        "Log-probs are averaged over tokens instead of summed.",
        _sums(
            "logps.mean(axis=0)",
            "mx.where(scored, logps, 0.0).sum(axis=-1) / scored.sum(axis=-1)",
        ),
    ),
    Mutation(
        "no_reference",
        "reference",
        "The reference is left out.",
        _log_ratio("policy.chosen", "policy.rejected"),
    ),
    Mutation(
        "crossed_reference",
        "reference",
        "The references of chosen and rejected are exchanged.",
        _log_ratio(
            "policy.chosen - reference.rejected",
            "policy.rejected - reference.chosen",
        ),
    ),
    Mutation(
        "moving_reference",
        "reference",
        "The reference is the policy of the same step.",
        _log_ratio(
            "policy.chosen - mx.stop_gradient(policy.chosen)",
            "policy.rejected - mx.stop_gradient(policy.rejected)",
        ),
    ),
    Mutation("no_beta", "β", "β is ignored.", _sigmoid("beta * margin", "margin")),
    Mutation(
        "beta_twice", "β", "β is applied twice.", _sigmoid("beta * margin", "beta * beta * margin")
    ),
    Mutation(
        "ipo_target",
        "β",
        "IPO's target is 1/β instead of 1/(2β).",
        (Edit(PAIRWISE, "mx.square(margin - 1 / (2 * beta))", "mx.square(margin - 1 / beta)"),),
        ("ipo_bandit",),
    ),
)

BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}


class Outcome(NamedTuple):
    """What a study said: the names of the claims that failed, or why it did not finish."""

    failed: tuple[str, ...]
    error: str = ""


def copy_checkout(folder: Path, mutation: Mutation | None) -> None:
    """Copy the checkout to `folder`, with the mutation.

    Raises:
        ValueError: the text that the mutation replaces is not in its file exactly once.
    """
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(csv_rows.ROOT / name, folder / name, ignore=ignored)
    for edit in mutation.edits if mutation else ():
        path = folder / edit.file
        text = path.read_text(encoding="utf-8")
        if (found := text.count(edit.before)) != 1:
            raise ValueError(
                f"{edit.file}: the text that mutation {mutation.name} replaces is there {found} "
                "times, not once; change the mutation with the code"
            )
        path.write_text(text.replace(edit.before, edit.after), encoding="utf-8")


def run_quick(study: str, folder: Path) -> Outcome:
    """Run the quick form of a study in a copy of the checkout."""
    command = [sys.executable, "-m", f"scripts.studies.{study}", "--quick"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return Outcome((), f"no result in {TIMEOUT} s")
    return read_outcome(done.returncode, done.stdout, done.stderr)


def read_outcome(status: int, output: str, errors: str) -> Outcome:
    """Return which claims failed by what a study printed, or its error.

    A study exits with 1 if a claim fails and with 0 if all hold; it printed all claims then.
    """
    words = [line.split(maxsplit=2) for line in output.splitlines()]
    failed = tuple(line[1].rstrip(":") for line in words if line[:1] == ["FAILS"])
    if status == bool(failed):
        return Outcome(failed)
    lines = errors.strip().splitlines()
    return Outcome((), lines[-1] if lines else f"exit status {status}")


def try_mutation(mutation: Mutation | None, studies: Sequence[str]) -> Iterator[Row]:
    """Yield a row per study: the claims that fail with the mutation, or the error."""
    with TemporaryDirectory(prefix="mutation-") as name:
        copy_checkout(Path(name), mutation)
        for study in studies:
            start = time.monotonic()
            outcome = run_quick(study, Path(name))
            yield {
                "mutation": mutation.name if mutation else UNCHANGED,
                "study": study,
                "failed": " ".join(outcome.failed),
                "error": outcome.error,
                "seconds": round(time.monotonic() - start),
                "commit": commit(),
            }


@click.command()
@click.option("--study", "studies", multiple=True, type=click.Choice(NAMES))
@click.option("--mutation", "names", multiple=True, type=click.Choice((UNCHANGED, *BY_NAME)))
@click.option("--all", "is_all", is_flag=True, help="Every mutation in every study.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for mutations.csv.  [default: docs/evidence; none with --study or --mutation]",
)
def main(
    studies: tuple[str, ...], names: tuple[str, ...], is_all: bool, output: Path | None
) -> None:
    """Break the package in twelve ways, and see which claims of which studies fail.

    By default each mutation runs in the studies that have to find it, and the unchanged package,
    the mutation `none`, in all studies.
    """
    folder = output or (None if studies or names else csv_rows.FOLDER)
    for name in names or (UNCHANGED, *BY_NAME):
        mutation = BY_NAME.get(name)
        chosen = studies or (mutation.studies if mutation and not is_all else NAMES)
        for row in try_mutation(mutation, chosen):
            outcome = row["failed"] or row["error"] or "all claims hold"
            print(f"{name} in {row['study']}: {outcome} ({row['seconds']} s)", flush=True)
            if folder:
                record(folder / csv_rows.MUTATIONS.name, row)


def record(path: Path, row: Row) -> None:
    """Write a row to a file; it replaces the earlier row of its mutation and study."""
    key = ("mutation", "study")
    earlier = csv_rows.read_rows(path) if path.exists() else []
    rows = [other for other in earlier if any(other[name] != row[name] for name in key)] + [row]
    mutations, studies = (UNCHANGED, *BY_NAME), NAMES
    known = [r for r in rows if r["mutation"] in mutations and r["study"] in studies]
    known.sort(key=lambda r: (mutations.index(r["mutation"]), studies.index(r["study"])))
    csv_rows.write_rows(path, known)


if __name__ == "__main__":
    main()
