"""`mlx-dpo collect`: collect preference pairs from a model's own answers."""

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.collect.contrastive import (
    CONTRASTIVE_FLAGS,
    ContrastiveFlags,
    JudgeFlags,
    check_single,
    collect_contrastive_pairs,
    contrastive_flags,
)
from mlx_dpo.cli.collect.results import (
    open_pairs_file,
    print_responder_notes,
    print_resumed,
    print_summary,
    run_with_progress,
)
from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.cli.judge_flags import connection_flags, judge_flags, make_connection, web_flags
from mlx_dpo.cli.output import echo
from mlx_dpo.cli.sampling_flags import (
    DEFAULT_SEED,
    make_samplings,
    sampling_flags,
)
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.cli.collect.terminal import ReadPrompt
    from mlx_dpo.collect.pairs_file import PairsFile
    from mlx_dpo.collect.sample import SamplingPlan
    from mlx_dpo.collect.session import TaskSampler
    from mlx_dpo.data.prompts import Prompt


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
        "mlx-dpo collect run --prompts prompts.txt -o pairs.jsonl --principles default",
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
@web_flags("Rank the answers in a browser on this machine.")
@click.option(
    "--print-rubric",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_rubric,
    help="Print the default rubric of judges, as a start for --rubric, and exit.",
)
@contrastive_flags
@judge_flags
@connection_flags
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
    judge model ranks them. With --principles, --system-chosen or --answers-from, the better answer
    is known from how it was made, and a judge may confirm it. Every decision is saved at once; the
    same command resumes where it stopped. Prompts without a pair (ties, skipped prompts) go to a
    second file that ends in `.passed.jsonl`.
    """
    connection = make_connection(settings, judge, settings["critic"], settings["answers_from"])
    given = {name: settings.pop(name) for name in CONTRASTIVE_FLAGS}
    judging = JudgeFlags(reward, judge, rubric, connection)
    flags = ContrastiveFlags(**given, judging=judging)
    flags.check()
    _check_flags(flags, prompts, web=web, port=port, no_open=no_open)
    samplings = make_samplings(settings)
    if flags.method is not None:
        check_single(flags.method, runs, samplings)
        assert prompts is not None
        collect_contrastive_pairs(flags, runs, model, prompts, output, samplings[0])
        return

    from mlx_dpo.collect.sample import SamplingPlan, judge_all
    from mlx_dpo.evaluation.judge import open_judge

    plan = SamplingPlan(answers=answers, samplings=samplings)
    plan.check(max(1, len(runs)))
    pairs_file = open_pairs_file(output)
    prompt_list = _read_prompts(prompts)
    is_judged = judging.is_given
    opened_judge = open_judge(reward, judge, rubric, connection) if is_judged else None
    tasks, system = _open_sampler(runs, model, prompt_list, pairs_file, plan, automatic=is_judged)
    print_resumed(tasks)
    if opened_judge is not None:
        run_with_progress(tasks, judge_all(tasks, opened_judge))
    else:
        read_prompt = partial(_read_typed_prompt, system) if prompts is None else None
        _ask_person(tasks, web=web, port=port, no_open=no_open, read_prompt=read_prompt)
    print_summary(pairs_file)


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
    print_responder_notes(responders, prompts, plan.samplings[0].max_tokens)
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


def _check_flags(
    flags: ContrastiveFlags, prompts: str | None, *, web: bool, port: int | None, no_open: bool
) -> None:
    for name, is_given in (("port", port is not None), ("--no-open", no_open)):
        if is_given and not web:
            raise ConfigError(f"`{name}` has no effect without --web")
    if flags.is_automatic and web:
        others = flags.method or "--reward or --judge"
        raise ConfigError(f"`web` has no effect with {others}; leave out one of them")
    if prompts == "-" and not flags.is_automatic:
        raise ConfigError("`-` has no effect: keys are read from stdin; give prompts in a file")
    if prompts is None and (flags.is_automatic or web):
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
