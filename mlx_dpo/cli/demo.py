"""`mlx-dpo demo`: convert, train and compare the shipped model in a few minutes."""

import shlex
from typing import TYPE_CHECKING

import click

from mlx_dpo.cli.command import FOLDER, Command
from mlx_dpo.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_dpo.demo.tour import Answers, Demo
    from mlx_dpo.types import MetricsRow

SHOWN = 5  # answers of each kind in the table of sampled answers


@click.command(cls=Command, examples=("mlx-dpo demo",))
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default="mlx-dpo-demo",
    metavar="FOLDER",
    help="Folder for the model and the run.",
)
def demo(output: str) -> None:
    """Convert a tiny chat model, align it with DPO, measure it and compare its answers.

    The shipped model answers politely or rudely at random. It is trained on a thousand pairs in
    which the polite answer is chosen; afterwards it answers politely, and just as correctly. No
    network is needed.
    """
    from pathlib import Path

    from mlx_dpo import DPOTrainer
    from mlx_dpo.cli import program
    from mlx_dpo.cli.progress import run_with_progress
    from mlx_dpo.demo.tour import BITS, Demo
    from mlx_dpo.reporting.terminal.console import make_console

    console, stages = make_console(), Demo(Path(output))
    if stages.clear():
        console.print(f"(replaces the earlier demo in {stages.folder})")

    console.print(f"\n1. Convert {stages.source.name} to {BITS} bits", style="bold")
    report = stages.convert()
    console.print(
        f"{format_bytes(report.bytes_before)} before, {format_bytes(report.bytes_after)} after; "
        f"log-probabilities differ by {report.conversion_error:.3f} nats per token on average"
    )
    console.print(f"\n2. Ask the base {len(stages.rows)} questions it has not seen", style="bold")
    before = stages.ask(reference=True)
    console.print(f"{before.courteous:.0%} polite, {before.correct:.0%} correct")

    console.print("\n3. Train on pairs that prefer polite answers", style="bold")
    with DPOTrainer(stages.config()) as run:
        run_with_progress(run)

    console.print("\n4. Ask the aligned model the same questions", style="bold")
    after = stages.ask(reference=False)
    console.print(f"{after.courteous:.0%} polite, {after.correct:.0%} correct")
    assert run.evaluation is not None
    console.print(_results_table(run.evaluation, before, after, stages.divergence(after)))
    console.print(_samples_table(stages, before, after))
    console.print(f"Talk to it: {program()} chat {shlex.quote(str(stages.run))}")
    console.print(f"Talk to the base: {program()} chat {shlex.quote(str(stages.run))} --base")


def _samples_table(stages: "Demo", before: "Answers", after: "Answers") -> "Table":
    from rich.table import Table

    changes = stages.politeness_changes(before, after)
    polite, rude = changes.became_polite, changes.became_rude
    title = (
        f"\n{len(polite)} of {len(after.texts)} sampled answers became polite, {len(rude)} became "
        f"rude, the others did not change in this; the first {SHOWN} of each kind"
    )
    table = Table("prompt", "before", "after", title=title, title_justify="left")
    for indices in (polite, rude):
        for index in indices[:SHOWN]:
            turns = stages.prompt_rows[index]["prompt"]
            prompt = "\n".join(turn["content"] for turn in turns)
            table.add_row(prompt, before.texts[index].strip(), after.texts[index].strip())
        table.add_section()
    return table


def _results_table(
    evaluation: "MetricsRow", before: "Answers", after: "Answers", divergence: float
) -> "Table":
    from rich.table import Table

    table = Table("", title="\nbefore and after, on held-out data", title_justify="left")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    # Before training every margin is 0: policy and reference are the same, and pairs tie.
    accuracy, margin = evaluation["eval_rewards/accuracies"], evaluation["eval_rewards/margins"]
    table.add_row("accuracy on held-out pairs", "50% (no difference)", f"{accuracy:.1%}")
    table.add_row("reward margin", "0.00", f"{margin:.2f}")
    table.add_row("polite answers", f"{before.courteous:.1%}", f"{after.courteous:.1%}")
    table.add_row("answers with correct content", f"{before.correct:.1%}", f"{after.correct:.1%}")
    table.add_row("KL from the base, in nats", "0.0", f"{divergence:.1f}")
    return table
