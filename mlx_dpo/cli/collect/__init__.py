"""`mlx-dpo collect`: answers side by side, and which is the better one, written at once."""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli import INTERRUPTED
from mlx_dpo.cli.sampling_flags import answer_flags, judge_flags, samplings
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.cli.collect.terminal import ReadPrompt
    from mlx_dpo.collect.pairs_file import PairsFile
    from mlx_dpo.collect.sample import SamplingPlan
    from mlx_dpo.collect.session import TaskSampler
    from mlx_dpo.data.prompts import Prompt


def _print_rubric(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from mlx_dpo.evaluation.judge import default_rubric

    click.echo(default_rubric(), nl=False)
    ctx.exit()


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--model", metavar="MODEL", help="A folder or Hub id, in place of runs.")
@click.option("--prompts", metavar="FILE", help="Prompts or pairs. [default: typed]")
@click.option("--output", required=True, metavar="FILE", help="Pairs to write or to go on with.")
@click.option("--answers", default=2, help="Answers to each prompt.")
@click.option("--web", is_flag=True, help="Pick in a browser on this machine.")
@click.option("--port", type=click.IntRange(0, 65535), help="With --web. [default: a free one]")
@click.option(
    "--print-rubric",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_rubric,
    help="Print what a judge is told, to begin a --rubric with, and leave.",
)
@judge_flags
@answer_flags(temperature=1.0, several=True)
def collect(  # noqa: PLR0913 (one argument for each flag)
    runs: tuple[str, ...],
    model: str | None,
    prompts: str | None,
    output: str,
    answers: int,
    web: bool,
    port: int | None,
    reward: str | None,
    judge: str | None,
    rubric: str | None,
    **settings: Any,
) -> None:
    """Sample answers of RUNs or of a model and keep which is better, as pairs to train on.

    A person picks, blind and in random order, or a reward function or a judge model does. Every
    pick is on disk at once; the same command goes on where it stopped. Prompts without a pair
    (ties, skipped ones) are kept beside, in a file that ends in `.passed.jsonl`.

    \b
    mlx-dpo collect run --prompts prompts.txt --output pairs.jsonl
    mlx-dpo collect run --prompts prompts.txt --output pairs.jsonl --web
    mlx-dpo collect run --prompts prompts.txt --output pairs.jsonl --reward rewards.py:courtesy
    """
    automatic = reward is not None or judge is not None
    _check_flags(automatic, web, port, prompts)

    from mlx_dpo.collect.sample import SamplingPlan
    from mlx_dpo.evaluation.judge import check_judge, open_judge

    asking = SamplingPlan(answers=answers, samplings=samplings(settings))
    asking.check(max(1, len(runs)))
    check_judge(reward, judge, rubric)
    picks = _open_pairs_file(output)
    asked_for = _read_prompts(prompts)
    decides = open_judge(reward, judge, rubric) if automatic else None
    asked, system = _open_sampler(runs, model, asked_for, picks, asking, automatic=automatic)
    _print_progress(asked)
    if decides is not None:
        from mlx_dpo.collect.sample import judge_all

        _show_progress(asked, (pick.passed for _, pick in judge_all(asked, decides)))
    else:
        typed = partial(_read_typed_prompt, system) if prompts is None else None
        _ask_person(asked, web=web, port=port, typed=typed)
    _print_summary(picks)


def _open_pairs_file(output: str) -> "PairsFile":
    from mlx_dpo.collect.pairs_file import PairsFile

    picks = PairsFile(Path(output).expanduser())
    for note in picks.notes:
        click.echo(note, err=True)
    return picks


def _read_prompts(prompts: str | None) -> "list[Prompt]":
    from mlx_dpo.data.prompts import read_prompts

    return [] if prompts is None else read_prompts(prompts)


def _open_sampler(
    runs: tuple[str, ...],
    model: str | None,
    asked_for: "list[Prompt]",
    picks: "PairsFile",
    asking: "SamplingPlan",
    *,
    automatic: bool,
) -> "tuple[TaskSampler, str | None]":
    """The prompts and who answers them, after which system message; says what there is to say."""
    from mlx_dpo.collect.sample import (
        JUDGE_CHUNK,
        PERSON_CHUNK,
        make_answer_sampler,
        open_responders,
    )
    from mlx_dpo.collect.session import TaskSampler
    from mlx_dpo.data.prompts import add_system_prompt

    voices = open_responders(runs, model)
    for voice in voices:
        for note in voice.base.notes:
            click.echo(note, err=True)
    system = voices[0].system
    if len({voice.system for voice in voices}) > 1:
        told = (
            "without a system message" if system is None else f"after the system message {system}"
        )
        click.echo(f"RUNs differ in their system messages; all are asked {told}", err=True)
    asked = TaskSampler(
        add_system_prompt(asked_for, system),
        picks,
        make_answer_sampler(voices, asking),
        chunk=JUDGE_CHUNK if automatic else PERSON_CHUNK,
        seed=asking.samplings[0].seed or 0,
    )
    return asked, system


def _ask_person(
    asked: "TaskSampler", *, web: bool, port: int | None, typed: "ReadPrompt | None"
) -> None:
    if not web:
        from mlx_dpo.cli.collect.terminal import rank_at_terminal

        rank_at_terminal(asked, typed=typed)
    elif asked.left:
        from mlx_dpo.cli.collect.terminal import rank_in_browser

        rank_in_browser(asked, port or 0)


def _check_flags(automatic: bool, web: bool, port: int | None, prompts: str | None) -> None:
    if port is not None and not web:
        raise ConfigError("`port` has no effect without --web")
    if automatic and web:
        raise ConfigError("`web` has no effect where no person picks; leave --reward or --judge")
    if prompts == "-" and not automatic:
        raise ConfigError("`-` is where keys are read from; give prompts in a file")
    if prompts is None and (automatic or web):
        raise ConfigError("--prompts is missing; prompts are typed only where a person picks here")


def _read_typed_prompt(system: str | None) -> "Prompt | None":
    """The next prompt that a person types; None to leave."""
    from mlx_dpo.data.prompts import add_system_prompt, make_prompt

    try:
        text = input("prompt> ") if sys.stdin.isatty() else input()
    except EOFError:
        return None
    [prompt] = add_system_prompt([make_prompt(text, "prompt")], system) if text.strip() else [None]
    return prompt


def _show_progress(asked: "TaskSampler", decisions: Iterable[str | None]) -> None:
    from mlx_dpo.reporting.console import make_console, show_progress

    try:
        with show_progress(make_console(), "judged", total=asked.left, unit="prompts") as count:
            for _ in decisions:
                count(1)
    except KeyboardInterrupt:
        _print_summary(asked.picks)
        click.echo("Interrupted; the same command goes on", err=True)
        raise SystemExit(INTERRUPTED) from None


def _print_progress(asked: "TaskSampler") -> None:
    done = len(asked.prompts) - asked.left
    if done:
        click.echo(f"{done:,} of {len(asked.prompts):,} prompts are decided already", err=True)


def _print_summary(picks: "PairsFile") -> None:
    from mlx_dpo.cli import program
    from mlx_dpo.collect.sample import count_outcomes, count_truncated

    (_, pairs), *passed = count_outcomes(picks)
    counts = [f"{pairs:,} pair{'s' * (pairs != 1)}", *(f"{count:,} {why}" for why, count in passed)]
    click.echo(f"{picks.path}: {', '.join(counts)}")
    if cut := count_truncated(picks):
        click.echo(
            f"{cut:,} of the chosen answers {'was' if cut == 1 else 'were'} cut where their tokens "
            "ran out, which teaches to stop there; raise --max-tokens",
            err=True,
        )
    if pairs:
        click.echo(f"Train on them: {program()} train {picks.path} --model … --output …")
