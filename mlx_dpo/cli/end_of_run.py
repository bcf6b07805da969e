"""The end of a training run in a terminal: metrics before and after, result, next commands."""

import shlex
from typing import TYPE_CHECKING

from mlx_dpo.cli import program
from mlx_dpo.reporting.metrics_text import final_metrics_table
from mlx_dpo.reporting.terminal.console import print_label_table
from mlx_dpo.runs.summary import SummaryLine, summarize_end, summarize_findings
from mlx_dpo.training.monitor.verdict import Verdict, describe_result
from mlx_dpo.units import format_duration, format_items

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_dpo import DPOTrainer
    from mlx_dpo.types import MetricsRow

NEXT = (
    ("compare", "answers of base and policy side by side"),
    ("chat", "talk to the policy"),
    ("report", "the run's curves as a page"),
)


def print_ending(
    console: "Console", run: "DPOTrainer", rows: "list[MetricsRow]", seconds: float
) -> None:
    """Print how a finished run ended.

    Args:
        console: where to print.
        run: the finished run.
        rows: metrics rows of the steps that this process took.
        seconds: how long these steps and their evaluations took.
    """
    pairs = format_items(len(run.inputs.valid), f"held-out {run.config.unit}")
    if run.evaluation is not None:
        is_noise = run.verdict is not None and run.verdict.is_noise
        before = run.record["before"]
        console.print(
            final_metrics_table(run.evaluation, title=pairs, is_noise=is_noise, before=before)
        )
    result = describe_result(run.verdict, run.evaluation, pairs, run.record["before"])
    lines = [*summarize_findings(run.warnings, result), *summarize_end(run)]
    if rows:
        tokens = rows[-1]["num_tokens"] - run.start.num_tokens
        steps = format_items(len(rows), "steps")
        speed = f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
        lines.append(("time", f"{steps} in {format_duration(seconds)}, {speed}"))
    print_label_table(console, lines)


def list_next_commands(output: str, verdict: Verdict | None) -> list[SummaryLine]:
    """Return the lines about the adapters of a run and the commands to look at them with."""
    where = f"adapters in {output}"
    if verdict is not None and verdict.is_worse:
        where += ": they are worse than the base model"
    elif verdict is not None and verdict.is_noise:
        where += ": nothing shows that they are better than the base model"
    commands = [f"{program()} {command} {shlex.quote(output)}" for command, _ in NEXT]
    width = max(map(len, commands))
    return [
        ("output", where),
        *[
            ("" if number else "next", f"{command:<{width}}  {what}")
            for number, (command, (_, what)) in enumerate(zip(commands, NEXT, strict=True))
        ],
    ]
