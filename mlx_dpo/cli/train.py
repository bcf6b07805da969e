"""`mlx-dpo train`: train on pairs and write a run folder."""

import shlex
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.output import echo
from mlx_dpo.cli.setting_flags import (
    SettingsCommand,
    config_flag,
    help_all_flag,
    pairs_argument,
    resolve,
    setting_flags,
)

if TYPE_CHECKING:
    from mlx_dpo.training.monitor.verdict import Verdict


@click.command(
    cls=SettingsCommand,
    examples=(
        "mlx-dpo train pairs.jsonl --model mlx-community/Qwen3-0.6B-4bit --output run",
        "mlx-dpo train pairs.jsonl --model model -o run --epochs 2 --lr 2e-5",
        "mlx-dpo train --config settings.yaml",
        "mlx-dpo train --resume --output run",
    ),
)
@pairs_argument
@config_flag
@click.option("--resume", is_flag=True, help="Resume the run in --output from its last checkpoint.")
@click.option("--force", is_flag=True, help="Train even if the estimated memory does not suffice.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Print scorer, micro-batches, memory and other details."
)
@setting_flags(lambda spec: True)
@help_all_flag
@click.pass_context
def train(
    ctx: click.Context,
    /,
    config_file: str | None,
    resume: bool,
    force: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Train a LoRA adapter on PAIRS by Direct Preference Optimization.

    PAIRS is a file (JSONL, JSON, Parquet or CSV, optionally compressed), a folder with train and
    valid files, a dataset on the Hub (`org/name[:config][@revision]`), or `-` for standard input;
    several are concatenated. The schema of the rows is detected. Ctrl-C saves a checkpoint and
    stops the run; --resume continues it and ends with the same weights, bit for bit.
    """
    config = resolve(ctx, config_file, resume, flags)

    from mlx_dpo import DPOTrainer
    from mlx_dpo.cli import program
    from mlx_dpo.cli.progress import run_with_progress

    with DPOTrainer(config, resume=resume, force=force) as run:
        run_with_progress(run, verbose=verbose)
    if run.evaluation is None:
        echo("No pairs were held out, so nothing was measured on unseen pairs")
    echo(_closing_line(config.output, run.verdict, program()))


def _closing_line(output: str, verdict: "Verdict | None", command: str) -> str:
    """Return the last line of a run: where the adapters are, and what to do with them."""
    if verdict is not None and verdict.is_worse:
        return (
            f"Adapters in {output}, but they are worse than the base model (see above); to see "
            f"their answers: {command} compare {shlex.quote(output)}"
        )
    if verdict is not None and verdict.is_noise:
        return (
            f"Adapters in {output}, but nothing shows that they are better than the base model "
            f"(see above); to see their answers: {command} compare {shlex.quote(output)}"
        )
    return f"Adapters in {output}; talk to them with: {command} chat {shlex.quote(output)}"
