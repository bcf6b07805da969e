"""`mlx-dpo collect`: collect preference pairs from a model's own answers."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli import INTERRUPTED
from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.cli.output import echo
from mlx_dpo.cli.sampling_flags import DEFAULT_SEED, judge_flags, make_samplings, sampling_flags
from mlx_dpo.errors import ConfigError
from mlx_dpo.phases import phase

if TYPE_CHECKING:
    from mlx_dpo.cli.collect.terminal import ReadPrompt
    from mlx_dpo.collect.pairs_file import PairsFile
    from mlx_dpo.collect.sample import SamplingPlan
    from mlx_dpo.collect.session import TaskSampler
    from mlx_dpo.data.prompts import Prompt
    from mlx_dpo.evaluation.rewards import Judge


def _print_rubric(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from mlx_dpo.evaluation.judge import default_rubric

    echo(default_rubric(), nl=False)
    ctx.exit()


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo collect run --prompts prompts.txt --output pairs.jsonl",
        "mlx-dpo collect run --prompts prompts.txt --output pairs.jsonl --web",
        "mlx-dpo collect run --prompts prompts.txt --output pairs.jsonl \\",
        "  --reward rewards.py:courtesy",
    ),
)
@click.argument("runs", nargs=-1, metavar="[RUN]...", type=FOLDER)
@click.option(
    "-m",
    "--model",
    type=FOLDER,
    metavar="MODEL",
    help="Model instead of runs: a folder or a Hub id.",
)
@click.option(
    "--prompts",
    type=FILE,
    metavar="FILE",
    help="File of prompts or of pairs.",
    show_default="you type prompts",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    metavar="FILE",
    help="File to write pairs to; an existing one is continued.",
)
@click.option("--answers", default=2, help="Answers per prompt.")
@click.option("--web", is_flag=True, help="Rank the answers in a browser on this machine.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port for --web.",
    show_default="a free one",
)
@click.option("--no-open", is_flag=True, help="With --web: only print the page's address.")
@click.option(
    "--print-rubric",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_rubric,
    help="Print the default rubric of judges, as a start for --rubric, and exit.",
)
@judge_flags
@sampling_flags(
    temperature=1.0,
    seed=DEFAULT_SEED,
    many_temperatures=True,
    remarks={"temperature": "The default makes the answers differ; repeat it for several."},
)
def collect(  # noqa: PLR0913 (one argument per flag)
    runs: tuple[str, ...],
    model: str | None,
    prompts: str | None,
    output: str,
    answers: int,
    web: bool,
    port: int | None,
    no_open: bool,
    reward: str | None,
    judge: str | None,
    rubric: str | None,
    **settings: Any,
) -> None:
    """Sample answers of RUNs or of a model and write preference pairs to train on.

    A person ranks the answers without seeing which model wrote them, or a reward function or a
    judge model ranks them. Every decision is saved at once; the same command resumes where it
    stopped. Prompts without a pair (ties, skipped prompts) go to a second file that ends in
    `.passed.jsonl`.
    """
    automatic = reward is not None or judge is not None
    _check_flags(automatic, web, port, prompts)
    if no_open and not web:
        raise ConfigError("`--no-open` has no effect without --web")

    from mlx_dpo.collect.sample import SamplingPlan
    from mlx_dpo.evaluation.judge import check_judge, open_judge

    plan = SamplingPlan(answers=answers, samplings=make_samplings(settings))
    plan.check(max(1, len(runs)))
    check_judge(reward, judge, rubric)
    pairs_file = _open_pairs_file(output)
    prompt_list = _read_prompts(prompts)
    opened_judge = open_judge(reward, judge, rubric) if automatic else None
    tasks, system = _open_sampler(runs, model, prompt_list, pairs_file, plan, automatic=automatic)
    _print_resumed(tasks)
    if opened_judge is not None:
        _judge_with_progress(tasks, opened_judge)
    else:
        read_prompt = partial(_read_typed_prompt, system) if prompts is None else None
        _ask_person(tasks, web=web, port=port, no_open=no_open, read_prompt=read_prompt)
    _print_summary(pairs_file)


def _open_pairs_file(output: str) -> "PairsFile":
    from mlx_dpo.collect.pairs_file import PairsFile

    pairs_file = PairsFile(Path(output).expanduser())
    for note in pairs_file.notes:
        echo(note, err=True)
    return pairs_file


def _read_prompts(prompts: str | None) -> "list[Prompt]":
    from mlx_dpo.data.prompts import read_prompts

    return [] if prompts is None else read_prompts(prompts)


def _open_sampler(
    runs: tuple[str, ...],
    model: str | None,
    prompts: "list[Prompt]",
    pairs_file: "PairsFile",
    plan: "SamplingPlan",
    *,
    automatic: bool,
) -> "tuple[TaskSampler, str | None]":
    """Load the models and print notes; return the ranking tasks and the system message."""
    from mlx_dpo.collect.sample import (
        JUDGE_CHUNK,
        PERSON_CHUNK,
        make_answer_sampler,
        open_responders,
    )
    from mlx_dpo.collect.session import TaskSampler
    from mlx_dpo.data.prompts import add_system_prompt

    responders = open_responders(runs, model)
    for responder in responders:
        clipped = responder.clip_note(prompts, plan.samplings[0].max_tokens)
        for note in (*responder.notes, clipped):
            if note is not None:
                echo(note, err=True)
    system = responders[0].system
    if len({responder.system for responder in responders}) > 1:
        used = "no system message" if system is None else f"the system message {system}"
        echo(f"RUNs differ in their system messages; all of them get {used}", err=True)
    tasks = TaskSampler(
        add_system_prompt(prompts, system),
        pairs_file,
        make_answer_sampler(responders, plan),
        chunk_size=JUDGE_CHUNK if automatic else PERSON_CHUNK,
        seed=plan.samplings[0].seed or 0,
    )
    return tasks, system


def _ask_person(
    tasks: "TaskSampler",
    *,
    web: bool,
    port: int | None,
    no_open: bool,
    read_prompt: "ReadPrompt | None",
) -> None:
    if not web:
        from mlx_dpo.cli.collect.terminal import rank_at_terminal

        rank_at_terminal(tasks, read_prompt=read_prompt)
    elif tasks.remaining:
        from mlx_dpo.cli.collect.terminal import rank_in_browser

        rank_in_browser(tasks, port or 0, open_browser=not no_open)


def _check_flags(automatic: bool, web: bool, port: int | None, prompts: str | None) -> None:
    if port is not None and not web:
        raise ConfigError("`port` has no effect without --web")
    if automatic and web:
        raise ConfigError("`web` has no effect with --reward or --judge; leave out one of them")
    if prompts == "-" and not automatic:
        raise ConfigError("`-` has no effect: keys are read from stdin; give prompts in a file")
    if prompts is None and (automatic or web):
        raise ConfigError("missing --prompts; prompts can be typed only if a person ranks")


def _read_typed_prompt(system: str | None) -> "Prompt | None":
    """Read the next prompt that the person types; return None on Ctrl-D or Ctrl-C.

    A line that holds no prompt is skipped with a note.
    """
    from mlx_dpo.cli.chat.prompt import NotTextError, read_line
    from mlx_dpo.data.prompts import add_system_prompt, make_prompt

    is_terminal = sys.stdin.isatty()
    while True:
        try:
            text = read_line("prompt> " if is_terminal else "")
        except NotTextError as error:
            if not is_terminal:
                raise ConfigError("stdin: a prompt is not UTF-8; convert the text") from None
            echo(f"Error: {error}", err=True)
            continue
        except EOFError:
            return None
        except KeyboardInterrupt:
            echo("", err=True)
            return None
        if text.strip():
            return add_system_prompt([make_prompt(text, "prompt")], system)[0]
        echo("The prompt is empty; type one, or press Ctrl-D to finish", err=True)


def _judge_with_progress(tasks: "TaskSampler", judge: "Judge") -> None:
    from mlx_dpo.collect.sample import judge_all

    try:
        with phase("Judging answers", tasks.remaining, unit="prompts") as count:
            for _ in judge_all(tasks, judge):
                count(1)
    except KeyboardInterrupt:
        _print_summary(tasks.pairs_file)
        echo("Interrupted; run the same command to resume", err=True)
        raise SystemExit(INTERRUPTED) from None


def _print_resumed(tasks: "TaskSampler") -> None:
    done = len(tasks.prompts) - tasks.remaining
    if done:
        echo(f"{done:,} of {len(tasks.prompts):,} prompts already have a decision", err=True)


def _print_summary(pairs_file: "PairsFile") -> None:
    from mlx_dpo.cli import program
    from mlx_dpo.collect.sample import (
        count_context_full,
        count_truncated,
        describe_outcomes,
        describe_ties,
    )

    pairs = pairs_file.pair_count
    echo(f"{pairs_file.path}: {describe_outcomes(pairs_file)}")
    if (ties := describe_ties(pairs_file)) is not None:
        advice = "" if pairs else "; use another reward, more --answers or a higher --temperature"
        echo(f"{'' if pairs else 'Warning: '}{ties}{advice}", err=True)
    full = count_context_full(pairs_file)
    for cut, where, advice in (
        (count_truncated(pairs_file) - full, "token limit", "raise --max-tokens"),
        (full, "end of the model's context", "use shorter prompts"),
    ):
        if cut:
            echo(
                f"{cut:,} of the chosen answers {'was' if cut == 1 else 'were'} cut at the "
                f"{where}, and the model would learn to stop there; {advice}",
                err=True,
            )
    if pairs:
        path = shlex.quote(str(pairs_file.path))
        echo(f"Train on them: {program()} train {path} --model MODEL")
