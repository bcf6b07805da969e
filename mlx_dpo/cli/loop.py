"""`mlx-dpo loop`: iterative DPO, which collects pairs, trains and evaluates in rounds."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlx_dpo.cli import INTERRUPTED
from mlx_dpo.cli.collect.contrastive import check_single, principle_flags
from mlx_dpo.cli.command import FILE, missing_message
from mlx_dpo.cli.judge_flags import connection_flags, judge_flags, print_counts_at_end
from mlx_dpo.cli.output import echo
from mlx_dpo.cli.setting_flags import (
    SettingsCommand,
    config_flag,
    help_all_flag,
    read_settings,
    setting_flags,
    typed_settings,
)
from mlx_dpo.config.dpo_config import DPOConfig, get_settings
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError
from mlx_dpo.phases import phase

if TYPE_CHECKING:
    from mlx_dpo.collect.iterative.folder import IterativeSettings, Stage
    from mlx_dpo.collect.iterative.trainer import IterativeDPO


@click.command(
    cls=SettingsCommand,
    examples=(
        "mlx-dpo loop prompts.txt --model model --reward rewards.py:courtesy -o loop",
        "mlx-dpo loop prompts.txt --model model --judge ORG/MODEL --rounds 5 -o loop",
        "mlx-dpo loop prompts.txt --model model --principles default -o loop",
        "mlx-dpo loop --resume --output loop",
    ),
    aliases={"--prompts": ""},
    renamed={"--answer-tokens": "use --max-tokens"},
)
@click.argument("prompts", required=False, metavar="PROMPTS", type=FILE)
@config_flag
@click.option("--resume", is_flag=True, help="Resume the loop in --output where it stopped.")
@click.option("--rounds", default=3, help="Number of rounds; may be raised on resume.")
@click.option(
    "--answers", default=4, help="Answers per prompt; the best and the worst make a pair."
)
@click.option(
    "--prompts-per-round", type=int, help="Number of prompts per round.", show_default="all"
)
@click.option(
    "--valid-prompts",
    type=FILE,
    metavar="FILE",
    help="Prompts for evaluation.",
    show_default="the held-out split of PROMPTS, else a tenth of PROMPTS",
)
@click.option(
    "--reference",
    type=click.Choice(["previous", "base"]),
    default="previous",
    help="Reference of later rounds: the policy of the previous round, or the base model.",
)
@click.option(
    "--on-collapse",
    type=click.Choice(["warn", "stop"]),
    default="warn",
    help="What to do if a round's answers collapse: repeat themselves, are nearly empty, hit the "
    "length limit or drift far from the base model.",
)
@click.option(
    "--temperature",
    metavar="T",
    default=1.0,
    help="Sampling temperature of the answers. The default makes them differ.",
)
@click.option("--max-tokens", default=512, help="Maximum number of tokens per answer.")
@principle_flags
@judge_flags
@connection_flags
@setting_flags(lambda spec: True, also_required=("output",))
@help_all_flag
@click.pass_context
def loop(
    ctx: click.Context,
    /,
    prompts: str | None,
    config_file: str | None,
    resume: bool,
    **flags: Any,
) -> None:
    """Train on the policy's own answers to PROMPTS in several rounds: iterative (on-policy) DPO.

    In each round the policy answers the prompts, a reward function or a judge model picks the best
    and the worst answer, the policy is trained on these pairs, and its answers to held-out prompts
    are evaluated. With --principles, the policy revises its answers instead. All files are in
    --output. PROMPTS is a file, also given as --prompts FILE. The flags of `train` apply to every
    round.
    """
    training = {name: flags.pop(name) for name in list(flags) if name in get_settings()}
    config, settings = _resolve_settings(
        ctx, config_file, resume, training, flags | {"prompts": prompts}
    )

    from mlx_dpo.cli import program
    from mlx_dpo.collect.iterative.trainer import IterativeDPO

    resume_command = f"{program()} loop --resume --output {shlex.quote(str(config.output))}"
    try:
        with IterativeDPO(config, settings, resume=resume) as trainer:
            print_counts_at_end(trainer.connection)
            printed = _print_notes(trainer, 0)
            for stage in trainer.stages():
                echo(f"\n{_stage_title(stage)}", bold=True)
                _run_stage(trainer, stage, resume_command)
                printed = _print_notes(trainer, printed)
    except KeyboardInterrupt:
        echo(f"\nInterrupted; resume with: {resume_command}", err=True)
        raise SystemExit(INTERRUPTED) from None
    last = trainer.paths.round(trainer.last_round)
    rounds = [trainer.read_evaluation(number) for number in range(trainer.last_round + 1)]
    _print_results(rounds, str(trainer.judge.name))
    if trainer.last_round < settings.rounds:
        echo(
            f"Stopped after round {trainer.last_round}: its answers have collapsed; to continue: "
            f"{resume_command} --on-collapse warn"
        )
    echo(f"Page with charts and answers: {trainer.paths.html_page} (as Markdown: results.md)")
    echo(f"Chat with the last policy: {program()} chat {shlex.quote(str(last.run.folder))}")


def _print_results(rounds: list[dict[str, Any]], judge: str) -> None:
    """Print the results of all rounds as a table, and the warnings again."""
    from mlx_dpo.collect.iterative.report import round_warnings, summary_lines

    echo(f"\nResults on the held-out prompts, judged by {judge}\n", bold=True)
    for line in summary_lines(rounds):
        echo(line)
    for warning in (text for evaluation in rounds for text in round_warnings(evaluation)):
        echo(f"Warning: {warning}", err=True)
    echo()


def _print_notes(trainer: "IterativeDPO", printed: int) -> int:
    """Print the notes after the first `printed` ones; return how many there are."""
    for note in trainer.prompts.notes[printed:]:
        echo(note)
    return len(trainer.prompts.notes)


def _resolve_settings(
    ctx: click.Context,
    config_file: str | None,
    resume: bool,
    training: dict[str, Any],
    flags: dict[str, Any],
) -> tuple[DPOConfig, "IterativeSettings"]:
    """Merge the settings from defaults, a resumed loop, the config file and typed flags.

    Later sources in this order override earlier ones.
    """
    from mlx_dpo.collect.iterative.folder import (
        IterativePaths,
        IterativeSettings,
        read_loop_record,
    )

    typed = (read_settings(config_file) if config_file else {}) | typed_settings(ctx, training)
    for name in ("pairs", "mix"):
        if typed.get(name):
            raise ConfigError(f"`{name}` has no effect in a loop, which makes its own pairs")
    if not typed.get("output"):
        raise click.UsageError(missing_message(_missing(typed, flags, resume=resume)), ctx)
    paths = IterativePaths(Path(typed["output"]).expanduser())
    resumed = read_loop_record(paths) if resume else None
    earlier = resumed or {"settings": {}, "loop": {}}
    config = DPOConfig.from_dict(earlier["settings"] | typed)
    given = {
        name: value
        for name, value in flags.items()
        if not resumed or ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    sampling = dict(earlier["loop"].get("sampling", {}))
    for flag, field in (("temperature", "temperature"), ("max_tokens", "max_tokens")):
        if flag in given:
            sampling[field] = given.pop(flag)
    sampling["seed"] = config.seed
    merged = earlier["loop"] | given | {"sampling": Sampling(**sampling)}
    if merged.get("principles"):
        check_single("--principles")
    if missing := _missing(config.to_dict(), merged):
        raise click.UsageError(missing_message(missing), ctx)
    return config, IterativeSettings(**merged)


def _missing(settings: dict[str, Any], flags: dict[str, Any], *, resume: bool = False) -> list[str]:
    """Return the names of required parameters without a value; a loop to resume has the others."""
    given = {
        "PROMPTS": resume or flags["prompts"],
        "--model": resume or settings.get("model"),
        "--output": settings.get("output"),
        "--reward, --judge or --principles": resume
        or flags["reward"]
        or flags["judge"]
        or flags["principles"],
    }
    return [name for name, value in given.items() if not value]


def _stage_title(stage: "Stage") -> str:
    action = {
        "collect": "collect answers and judge them",
        "train": "train on the pairs",
        "evaluate": "answer the held-out prompts",
    }[stage.action]
    return f"Round {stage.round}: {action}" if stage.round else f"Base: {action}"


def _run_stage(trainer: "IterativeDPO", stage: "Stage", resume_command: str) -> None:
    """Run a stage of a round and show its progress on the console."""
    from mlx_dpo import DPOTrainer
    from mlx_dpo.cli.progress import run_with_progress
    from mlx_dpo.collect.iterative.report import HEADINGS, round_cells, round_warnings
    from mlx_dpo.reporting.terminal.console import make_console, print_label_table

    if stage.action == "collect":
        remaining_counts = trainer.collect(stage.round)
        remaining = next(remaining_counts)
        with phase("Collecting pairs", remaining, unit="prompts") as count:
            for now_remaining in remaining_counts:
                count(remaining - now_remaining)
                remaining = now_remaining
    elif stage.action == "train":
        with DPOTrainer(trainer.round_config(stage.round), resume=True) as run:
            run_with_progress(run, resume_command)
    else:
        evaluation = trainer.evaluate(stage.round)
        figures = zip(HEADINGS, round_cells(evaluation), strict=True)
        print_label_table(make_console(), [(name, cell) for name, cell in figures if cell])
        for warning in round_warnings(evaluation):
            echo(f"Warning: {warning}", err=True)
