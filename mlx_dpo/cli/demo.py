"""`mlx-dpo demo`: the whole job on the model that ships, in a few minutes."""

from typing import TYPE_CHECKING

import click

from mlx_dpo.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_dpo.demo.tour import Answers, Tour
    from mlx_dpo.types import MetricsRow

SHOWN = 6  # prompts whose answers stand side by side


@click.command()
@click.option(
    "--output", default="mlx-dpo-demo", metavar="DIR", help="Folder for the model and the run."
)
def demo(output: str) -> None:
    """Convert a tiny chat model, align it with DPO, measure it and compare its answers.

    The model that ships answers courteously or curtly, at the toss of a coin. A thousand
    pairs prefer the courteous answer; afterwards it answers courteously, and as rightly.
    Needs no network.
    """
    from pathlib import Path

    from mlx_dpo import DPOTrainer
    from mlx_dpo.cli import program
    from mlx_dpo.cli.progress import run_with_progress
    from mlx_dpo.demo.tour import BITS, Tour
    from mlx_dpo.reporting.console import make_console

    console, tour = make_console(), Tour(Path(output))
    if tour.clear():
        console.print(f"(in place of the earlier demo in {tour.folder})")

    console.print(f"\n1. Convert {tour.source.name} to {BITS} bits", style="bold")
    report = tour.convert()
    console.print(
        f"{format_bytes(report.bytes_before)} before, {format_bytes(report.bytes_after)} after; "
        f"log-probabilities differ by {report.conversion_error:.3f} nats a token on average"
    )
    console.print(f"\n2. Ask the base {len(tour.rows)} questions it has not seen", style="bold")
    before = tour.ask(reference=True)
    console.print(f"{before.courteous:.0%} courteous, {before.right:.0%} right")

    console.print("\n3. Train on pairs that prefer courteous answers", style="bold")
    with DPOTrainer(tour.config()) as run:
        run_with_progress(run)

    console.print("\n4. Ask the aligned model the same questions", style="bold")
    after = tour.ask(reference=False)
    console.print(f"{after.courteous:.0%} courteous, {after.right:.0%} right")
    console.print(_side_by_side(tour, before, after))
    assert run.evaluation is not None
    console.print(_figures(run.evaluation, before, after, tour.divergence(after)))
    console.print(f"Talk to it: {program()} chat {tour.run}")
    console.print(f"Talk to the base: {program()} chat {tour.run} --reference")


def _side_by_side(tour: "Tour", before: "Answers", after: "Answers") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table("prompt", "before", "after", title="\nsampled answers", title_justify="left")
    for row, old, new in list(zip(tour.asked, before.texts, after.texts, strict=True))[:SHOWN]:
        prompt = "\n".join(turn["content"] for turn in row["prompt"])
        table.add_row(Text(prompt), Text(old.strip()), Text(new.strip()))
    return table


def _figures(
    evaluation: "MetricsRow", before: "Answers", after: "Answers", divergence: float
) -> "Table":
    from rich.table import Table

    table = Table("", title="\nbefore and after, on what was held out", title_justify="left")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    # Before training every margin is 0: policy and reference are the same, and pairs tie.
    accuracy, margin = evaluation["eval_rewards/accuracies"], evaluation["eval_rewards/margins"]
    table.add_row("accuracy on held-out pairs", "50% (no difference)", f"{accuracy:.1%}")
    table.add_row("reward margin", "0.00", f"{margin:.2f}")
    table.add_row("courteous answers", f"{before.courteous:.1%}", f"{after.courteous:.1%}")
    table.add_row("answers with the right content", f"{before.right:.1%}", f"{after.right:.1%}")
    table.add_row("KL from the base, nats an answer", "0.0", f"{divergence:.1f}")
    return table
