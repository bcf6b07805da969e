"""`mlx-dpo train`: train on pairs and write a run folder."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import click

from mlx_dpo.cli.output import is_silent
from mlx_dpo.cli.ranks_flags import RanksFlags, rank_timeout_flag, ranks_flags
from mlx_dpo.cli.setting_flags import (
    SettingsCommand,
    config_flag,
    find_local_inputs,
    help_all_flag,
    pairs_argument,
    resolve,
    setting_flags,
)
from mlx_dpo.cli.stages import (
    StageDisplay,
    check_alone,
    pop_stages,
    resolve_stages,
    stages_flags,
    train_stages,
)
from mlx_dpo.cli.start_ranks import start_ranks
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.distributed.environment import find_rank
from mlx_dpo.errors import ConfigError, DPOError


@click.command(
    cls=SettingsCommand,
    examples=(
        "mlx-dpo train pairs.jsonl --model mlx-community/Qwen3-0.6B-4bit",
        "mlx-dpo train pairs.jsonl --model model -o run --epochs 2 --lr 2e-5",
        "mlx-dpo train pairs.jsonl --model model -o run --live",
        "mlx-dpo train pairs.jsonl --model model -o run --stages sft,dpo",
        "mlx-dpo train --config settings.yaml",
        "mlx-dpo train --resume --output run",
    ),
)
@pairs_argument
@config_flag
@click.option("--resume", is_flag=True, help="Resume the run in --output from its last checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --output.")
@click.option("--force", is_flag=True, help="Train even if the estimated memory does not suffice.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Print scorer, micro-batches, memory and other details."
)
@click.option("--live", is_flag=True, help="Show the report in the browser while training.")
@click.option("--no-open", is_flag=True, help="With --live: only print the page's address.")
@stages_flags
@ranks_flags
@rank_timeout_flag
@setting_flags(lambda spec: True)
@help_all_flag
@click.pass_context
def train(
    ctx: click.Context,
    /,
    config_file: str | None,
    resume: bool,
    overwrite: bool,
    force: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Train a LoRA adapter on PAIRS by Direct Preference Optimization.

    PAIRS is a file (JSONL, JSON, Parquet or CSV, optionally compressed), a folder with train and
    valid files, a dataset on the Hub (`org/name[:config][@revision]`), or `-` for standard input;
    several are concatenated. The schema of the rows is detected. With --loss-type sft (instruction
    tuning) rows have one answer, or a conversation. Ctrl-C saves a checkpoint and stops the run;
    --resume continues it and ends with the same weights, bit for bit. With --live the report is
    served on this machine until training ends; the browser keeps it.
    """
    live, no_open = flags.pop("live"), flags.pop("no_open")
    if no_open and not live:
        raise ConfigError("`--no-open` has no effect without --live")
    wanted, stage_flags = RanksFlags.pop(flags), pop_stages(flags)
    stages = resolve_stages(ctx, config_file, resume, flags, stage_flags)
    if stages is not None:
        check_alone(wanted, overwrite=overwrite)
        display = StageDisplay(verbose=verbose, live=live, opens_browser=not no_open)
        train_stages(stages, display, resume=resume, force=force)
        return
    start_ranks(
        wanted,
        flags["pairs"],
        lambda: find_local_inputs(ctx, config_file, flags),
        keeps_awake=flags["caffeinate"],
    )

    options = (resume, overwrite, force)
    if find_rank(os.environ) is None:
        config = resolve(ctx, config_file, resume, flags)
    else:  # only rank 0 reads its command line
        config, options = _share(lambda: (resolve(ctx, config_file, resume, flags), options))

    from mlx_dpo import DPOTrainer
    from mlx_dpo.cli.end_of_run import list_next_commands
    from mlx_dpo.cli.live import serve_live_report
    from mlx_dpo.cli.progress import run_with_progress
    from mlx_dpo.reporting.terminal.console import make_console, print_label_table

    live = live and not is_silent()
    page = serve_live_report([config.output], open_browser=not no_open) if live else nullcontext()
    resume, overwrite, force = options
    with DPOTrainer(config, resume=resume, overwrite=overwrite, force=force) as run, page:
        run_with_progress(run, ranks_flags=wanted.shown(), verbose=verbose)
    print_label_table(make_console(), list_next_commands(config.output, run.verdict))


Options = tuple[bool, bool, bool]  # resume, overwrite, force


def _share(resolve_here: Callable[[], tuple[DPOConfig, Options]]) -> tuple[DPOConfig, Options]:
    """Return the settings and the flags of rank 0; `resolve_here` is called on rank 0 alone."""
    from mlx_dpo.distributed.connect import connect
    from mlx_dpo.runs.distributed.handshake import compare_machines, share_settings

    def resolve_to_json() -> tuple[dict[str, Any], Options]:
        config, options = resolve_here()
        return config.to_dict(), options

    peers = compare_machines(connect())
    values, options = share_settings(peers, resolve_to_json, (DPOError, click.ClickException))
    resume, overwrite, force = options
    return DPOConfig.from_dict(values), (resume, overwrite, force)
