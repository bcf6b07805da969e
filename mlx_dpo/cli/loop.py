"""`mlx-dpo loop`: rounds of collecting, training and measuring, from prompts alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlx_dpo.cli import INTERRUPTED
from mlx_dpo.cli.sampling_flags import judge_flags
from mlx_dpo.cli.train import SettingsCommand, read_settings, setting_flags, typed_settings
from mlx_dpo.config.dpo_config import DPOConfig, get_settings
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.collect.iterative_dpo import IterativeDPO
    from mlx_dpo.collect.iterative_folder import IterativeSettings, Stage


@click.command(cls=SettingsCommand)
@click.argument("prompts", required=False)
@click.option("--config", "config_file", metavar="FILE", help="YAML file of training settings.")
@click.option("--resume", is_flag=True, help="Go on with the loop in --output where it stopped.")
@click.option("--rounds", default=3, help="Rounds; may be raised when a loop goes on.")
@click.option("--answers", default=4, help="Answers to each prompt; the best meets the worst.")
@click.option("--prompts-per-round", type=int, help="The next so many each round. [default: all]")
@click.option(
    "--valid-prompts",
    metavar="FILE",
    help="Prompts to measure on. [default: PROMPTS' own held-out split, else a tenth]",
)
@click.option(
    "--reference",
    type=click.Choice(["previous", "base"]),
    default="previous",
    help="What later rounds are held against: the policy of the round before, or the base.",
)
@click.option("--temperature", default=1.0, help="Spread of the answers.")
@click.option("--answer-tokens", default=512, help="Tokens after which an answer is cut.")
@judge_flags
@setting_flags(lambda spec: True)
@click.pass_context
def loop(
    ctx: click.Context, /, prompts: str | None, config_file: str | None, resume: bool, **flags: Any
) -> None:
    """Train on a policy's own answers to PROMPTS, round after round: on-policy DPO.

    In each round the policy answers, a reward function or a judge model makes pairs of the
    answers, the policy is trained on them, and its answers to held-out prompts are measured.
    Everything lies in --output. Ended at any moment, --resume with the same --output goes on.
    The flags of `train` hold for every round.

    \b
    mlx-dpo loop prompts.txt --model model --reward rewards.py:courtesy --output loop
    mlx-dpo loop prompts.txt --model model --judge mlx-community/Qwen3-8B-4bit --output loop
    """
    training = {name: flags.pop(name) for name in list(flags) if name in get_settings()}
    config, settings = _resolve_settings(
        ctx, config_file, resume, training, flags | {"prompts": prompts}
    )

    from mlx_dpo.cli import program
    from mlx_dpo.collect.iterative_dpo import IterativeDPO

    go_on = f"{program()} loop --resume --output {config.output}"
    try:
        with IterativeDPO(config, settings, resume=resume) as going:
            for note in going.asked.notes:
                click.echo(note)
            for stage in going.stages():
                click.secho(f"\n{_stage_title(stage)}", bold=True)
                _run_stage(going, stage, go_on)
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted; go on with: {go_on}", err=True)
        raise SystemExit(INTERRUPTED) from None
    last = going.paths.round(settings.rounds)
    click.echo(f"\n{going.paths.page.read_text('utf-8')}")
    click.echo(f"The rounds are in {going.paths.page}, a page for each beside its run")
    click.echo(f"Talk to the last policy: {program()} chat {last.run.folder}")


def _resolve_settings(
    ctx: click.Context,
    config_file: str | None,
    resume: bool,
    training: dict[str, Any],
    flags: dict[str, Any],
) -> tuple[DPOConfig, "IterativeSettings"]:
    """Defaults, then the loop that is resumed, then the file, then what was typed."""
    from mlx_dpo.collect.iterative_folder import IterativePaths, IterativeSettings, read_loop_record

    typed = (read_settings(config_file) if config_file else {}) | typed_settings(ctx, training)
    for name in ("pairs", "mix"):
        if typed.get(name):
            raise ConfigError(f"`{name}` has no effect in a loop, which makes its own pairs")
    if not typed.get("output"):
        raise ConfigError("--output is missing; see `mlx-dpo loop --help`")
    earlier = (
        read_loop_record(IterativePaths(Path(typed["output"]).expanduser())) if resume else None
    )
    before = earlier or {"settings": {}, "loop": {}}
    config = DPOConfig.from_dict(before["settings"] | typed)
    given = {
        name: value
        for name, value in flags.items()
        if not earlier or ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    answering = dict(before["loop"].get("sampling", {}))
    for name, field in (("temperature", "temperature"), ("answer_tokens", "max_tokens")):
        if name in given:
            answering[field] = given.pop(name)
    sampling = Sampling(**answering | {"seed": config.seed})
    wanted = before["loop"] | given | {"sampling": sampling}
    for name, there in (("--model", config.model), ("PROMPTS", wanted["prompts"])):
        if not there:
            raise ConfigError(f"{name} is missing; see `mlx-dpo loop --help`")
    return config, IterativeSettings(**wanted)


def _stage_title(stage: "Stage") -> str:
    done = {
        "collect": "collect answers and judge them",
        "train": "train on the pairs",
        "evaluate": "answer the held-out prompts",
    }[stage.todo]
    return f"Round {stage.round}: {done}" if stage.round else f"Base: {done}"


def _run_stage(going: "IterativeDPO", stage: "Stage", go_on: str) -> None:
    from mlx_dpo import DPOTrainer
    from mlx_dpo.cli.progress import run_with_progress
    from mlx_dpo.collect.iterative_report import HEADINGS, round_cells
    from mlx_dpo.reporting.console import make_console, print_facts, show_progress

    if stage.todo == "collect":
        lefts = going.collect(stage.round)
        left = next(lefts)
        with show_progress(make_console(), "judged", total=left, unit="prompts") as count:
            for now in lefts:
                count(left - now)
                left = now
    elif stage.todo == "train":
        with DPOTrainer(going.training(stage.round), resume=True) as run:
            run_with_progress(run, go_on)
    else:
        figures = zip(HEADINGS, round_cells(going.evaluate(stage.round)), strict=True)
        print_facts(make_console(), [(name, cell) for name, cell in figures if cell])
