"""`mlx-dpo train --stages`: instruction tuning, then preferences, in one folder."""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE
from mlx_dpo.cli.default_output import choose_run_folder
from mlx_dpo.cli.output import echo
from mlx_dpo.cli.ranks_flags import RanksFlags
from mlx_dpo.cli.setting_flags import STAGE_KEYS, check_none_missing, file_settings, typed_settings
from mlx_dpo.distributed.environment import find_rank
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.notices import notify

if TYPE_CHECKING:
    from mlx_dpo import DPOConfig, DPOTrainer
    from mlx_dpo.runs.inputs import Inputs
    from mlx_dpo.runs.stages.settings import Stage, StageSettings
    from mlx_dpo.training.monitor.verdict import Verdict

CommandFunction = Callable[..., Any]
STAGES, SFT = STAGE_KEYS
SFT_FLAGS = {  # flag -> setting of the first stage
    "sft_rows": "pairs",
    "sft_learning_rate": "learning_rate",
    "sft_epochs": "epochs",
    "sft_max_steps": "max_steps",
}


def stages_flags(command: CommandFunction) -> CommandFunction:
    """Add to `train` the flags of training in stages."""
    for decorate in (
        click.option(
            "--sft-max-steps",
            type=click.IntRange(min=1),
            metavar="N",
            help="With --stages: optimizer steps of instruction tuning (instead of epochs).",
        ),
        click.option(
            "--sft-epochs",
            type=click.IntRange(min=1),
            metavar="N",
            help="With --stages: passes over the rows of instruction tuning.",
            show_default="1",
        ),
        click.option(
            "--sft-learning-rate",
            type=float,
            metavar="RATE",
            help="With --stages: peak learning rate of instruction tuning.",
            show_default="computed from model width and adapters",
        ),
        click.option(
            "--sft-rows",
            type=FILE,
            metavar="FILE",
            help="With --stages: rows of instruction tuning.",
            show_default="the chosen answers of PAIRS",
        ),
        click.option(
            "--stages",
            metavar="sft,dpo",
            help="Train in two stages: instruction tuning, then preferences. --learning-rate, "
            "--epochs, --max-steps and the flags of losses apply to the second stage, most other "
            "flags to both.",
        ),
    ):
        command = decorate(command)
    return command


def pop_stages(flags: dict[str, Any]) -> dict[str, Any]:
    """Take the flags of training in stages out of `flags`; return those that have a value."""
    return {name: value for name in (STAGES, *SFT_FLAGS) if (value := flags.pop(name)) is not None}


def check_alone(ranks: RanksFlags, *, overwrite: bool) -> None:
    """Raise `ConfigError` for flags that do not go with stages."""
    if ranks.starts_ranks:
        raise ConfigError("`--stages` train in one process; leave out --ranks and --hosts")
    if overwrite:
        raise ConfigError(
            "`--overwrite` is not possible with --stages; choose another --output, or delete the "
            "folder"
        )


def resolve_stages(
    ctx: click.Context,
    config_file: str | None,
    resume: bool,
    flags: dict[str, Any],
    stage_flags: dict[str, Any],
) -> "StageSettings | None":
    """Combine the recorded settings of resumed stages, YAML file and flags; None without stages.

    Later sources override earlier ones.

    Raises:
        ConfigError: a setting has no effect, or is not valid.
        click.UsageError: required settings are missing.
    """
    if find_rank(os.environ) is not None:  # a rank of a run, which rank 0 gives its settings
        return None
    values = file_settings(ctx, config_file)
    names, first = _read_names(values.pop(STAGES, None)), _read_first(values.pop(SFT, None))
    values |= typed_settings(ctx, flags)
    names = _read_names(stage_flags.get(STAGES)) or names
    typed = {SFT_FLAGS[name]: v for name, v in stage_flags.items() if name != STAGES}
    first |= {name: (value,) if name == "pairs" else value for name, value in typed.items()}
    earlier = _recorded(values, resume=resume)
    if earlier is not None:
        output = values["output"]
        values, first = {**earlier.values, **values, "output": output}, {**earlier.first, **first}
        names = names or earlier.names
    if not names:
        if first:
            typed_flag = next(iter(stage_flags), "").replace("_", "-")
            name = f"--{typed_flag}" if typed_flag else SFT
            raise ConfigError(f"`{name}` has no effect without --stages sft,dpo")
        return None
    check_none_missing(ctx, values, flags)
    if not values.get("output"):
        values["output"] = choose_run_folder(str(values["model"]))
        echo(f"Run folder: {values['output']}", err=True)

    from mlx_dpo.runs.stages.settings import StageSettings

    return StageSettings(names, values, first)


def _recorded(values: dict[str, Any], *, resume: bool) -> "StageSettings | None":
    """Return the settings of the stages to resume; None if the folder has none."""
    if not (resume and values.get("output")):
        return None

    from mlx_dpo.runs.stages.training import read_stages

    return read_stages(Path(str(values["output"])))


def _read_names(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value or ()
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"`{STAGES}` must be sft,dpo, got {value!r}")
    return tuple(item.strip() for item in items)


def _read_first(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"`{SFT}` must be settings of the stage `sft`, got {value!r}")
    return dict(value or {})


@dataclass(frozen=True)
class StageDisplay:
    """What `train` shows of its stages."""

    verbose: bool  # details before each stage
    live: bool  # the report of both stages in the browser
    opens_browser: bool

    def page(self, folders: list[str]) -> AbstractContextManager[None]:
        """Serve the live report of the run folders inside the block, if it is wanted."""
        if not self.live:
            return nullcontext()

        from mlx_dpo.cli.live import serve_live_report

        return serve_live_report(folders, open_browser=self.opens_browser)


def train_stages(
    settings: "StageSettings", display: StageDisplay, *, resume: bool, force: bool
) -> None:
    """Train the stages that are not finished, each with its progress, and print what is next.

    Args:
        settings: the settings of the stages.
        display: what is shown of them.
        resume: whether the stages are resumed.
        force: train even if the estimated memory does not suffice.
    """
    from mlx_dpo.cli import program
    from mlx_dpo.cli.end_of_run import list_next_commands
    from mlx_dpo.reporting.terminal.console import make_console, print_label_table
    from mlx_dpo.runs.stages.training import StagedTraining

    output = str(settings.output)
    command = f"{program()} train --resume --output {shlex.quote(output)}"
    verdict: Verdict | None = None
    with StagedTraining(settings, resume=resume) as training:
        folders = [stage.config.output for stage in training.all_stages]
        with display.page(folders):
            for number, stage in training.stages():
                title = f"Stage {number} of {len(folders)}: {stage.name}, in {stage.config.output}"
                echo(f"\n{title}", bold=True)
                with _trained(stage, command, force=force, verbose=display.verbose) as run:
                    verdict = run.verdict
                    if number == len(folders):
                        _warn_of_known_prompts(training.all_stages[0].config, run.inputs)
    print_label_table(make_console(), list_next_commands(folders[-1], verdict))


@contextmanager
def _trained(
    stage: "Stage", resume_command: str, *, force: bool, verbose: bool
) -> "Iterator[DPOTrainer]":
    """Train a stage from its start or its last checkpoint; yield the trainer."""
    from mlx_dpo import DPOTrainer
    from mlx_dpo.cli.progress import run_with_progress

    with DPOTrainer(stage.config, resume=True, force=force) as run:
        run_with_progress(run, resume_command, verbose=verbose)
        yield run


def _warn_of_known_prompts(first: "DPOConfig", inputs: "Inputs") -> None:
    """Warn if the first stage was trained on prompts that the last one holds out."""
    from mlx_dpo.runs.stages.training import count_trained_before

    if known := count_trained_before(first, inputs):
        notify(
            f"{known:,} of {len(inputs.valid):,} held-out pairs have a prompt that the stage "
            "`sft` was trained on, so the metrics on them are too good; make two files with "
            "`mlx-dpo data split`, and name the second with --valid"
        )
