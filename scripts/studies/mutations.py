"""Break the package in twelve ways, and see which claims of which studies fail.

    python -m scripts.studies.mutations [--study NAME]... [--mutation NAME]...

Each mutation replaces text of the package in a copy of the checkout; the quick form of
each study runs there. Results go to docs/evidence/mutations.csv.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import click

from scripts.studies import NAMES
from scripts.studies.reporting.csv_rows import FOLDER, ROOT, read_rows, write_rows
from scripts.studies.reporting.study import Row

CSV = FOLDER / "mutations.csv"
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
        ("optimum_other_losses",),
    ),
)


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
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
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
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    failed = tuple(words[1].rstrip(":") for words in lines if words[:1] == ["FAILS"])
    unfinished = done.returncode != bool(failed)
    return Outcome(failed, done.stderr.strip().splitlines()[-1] if unfinished else "")


def try_mutation(mutation: Mutation | None, studies: tuple[str, ...]) -> Iterator[Row]:
    """Yield a row per study: the claims that fail with the mutation, or the error."""
    with TemporaryDirectory(prefix="mutation-") as name:
        copy_checkout(Path(name), mutation)
        for study in studies:
            outcome = run_quick(study, Path(name))
            yield {
                "mutation": mutation.name if mutation else UNCHANGED,
                "breaks": mutation.breaks if mutation else "",
                "what": mutation.what if mutation else "Nothing is changed.",
                "study": study,
                "failed": " ".join(outcome.failed),
                "error": outcome.error,
            }


@click.command(help="Break the package in twelve ways, and see which claims of studies fail.")
@click.option("--study", "studies", multiple=True, type=click.Choice(NAMES))
@click.option("--mutation", "names", multiple=True)
def main(studies: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Run the chosen mutations, all by default, and write their rows."""
    known = {mutation.name: mutation for mutation in MUTATIONS}
    for name in names or (UNCHANGED, *known):
        mutation = known.get(name)
        chosen = studies or (mutation.studies if mutation else NAMES)
        for row in try_mutation(mutation, chosen):
            print(f"{row['mutation']} in {row['study']}: {row['failed'] or '-'} {row['error']}")
            _record(row)


def _record(row: Row) -> None:
    earlier = read_rows(CSV) if CSV.exists() else []
    key = ("mutation", "study")
    kept = [other for other in earlier if any(other[name] != row[name] for name in key)]
    order = [UNCHANGED, *(mutation.name for mutation in MUTATIONS)]
    rows = sorted([*kept, row], key=lambda row: (order.index(row["mutation"]), row["study"]))
    write_rows(CSV, rows)


if __name__ == "__main__":
    main()
