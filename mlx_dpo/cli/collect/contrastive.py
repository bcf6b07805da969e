"""`mlx-dpo collect` of contrastive pairs: by principles, system prompts or a teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from mlx_dpo.cli.collect.results import (
    open_pairs_file,
    print_responder_notes,
    print_resumed,
    print_summary,
    run_with_progress,
)
from mlx_dpo.cli.command import FILE, FOLDER
from mlx_dpo.cli.judge_flags import AN_ADDRESS, RESPONDER
from mlx_dpo.cli.output import echo
from mlx_dpo.cli.system_prompt import METAVAR, read_system_prompt
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.collect.contrastive_pairs import PairRule
    from mlx_dpo.collect.session import AnswerSampler
    from mlx_dpo.data.prompts import Prompt
    from mlx_dpo.evaluation.rewards import Judge
    from mlx_dpo.generation.responder import Responder
    from mlx_dpo.openai_client.connection import Connection

Command = Callable[..., Any]
METHODS = ("principles", "system_chosen", "answers_from")  # flags that make the better answer
CONTRASTIVE_FLAGS = (*METHODS, "revisions", "revision_temperature", "critic", "system_rejected")


def _print_principles(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from mlx_dpo.collect.principles.principle_set import default_principles

    echo(default_principles(), nl=False)
    ctx.exit()


def principle_flags(command: Command) -> Command:
    """Add `--principles` and the flags that belong to it to a command."""
    for decorate in (
        click.option(
            "--critic",
            type=FOLDER,
            metavar=RESPONDER,
            help="With --principles: model that criticises the answers.",
            show_default="the answering model",
        ),
        click.option(
            "--revision-temperature",
            type=click.FloatRange(min=0),
            metavar="T",
            help="With --principles: sampling temperature of critiques and revisions.",
            show_default="0, greedy",
        ),
        click.option(
            "--revisions",
            type=int,
            metavar="N",
            help="With --principles: critiques and revisions of each answer, one after another.",
            show_default="1",
        ),
        click.option(
            "--principles",
            type=FILE,
            metavar="FILE|default",
            help="Pairs by constitutional AI: the model criticises and revises its answer by a "
            "principle of this file; the revision is chosen, the first answer rejected.",
        ),
    ):
        command = decorate(command)
    return command


def contrastive_flags(command: Command) -> Command:
    """Add the flags of contrastive pairs to a command: teacher, principles, system prompts."""
    for decorate in (
        click.option(
            "--system-rejected",
            metavar=METAVAR,
            help="With --system-chosen: system prompt of the rejected answers.",
            show_default="none",
        ),
        click.option(
            "--system-chosen",
            metavar=METAVAR,
            help="Pairs by contrast: answers with this system prompt are chosen. The pairs are "
            "stored without it.",
        ),
        click.option(
            "--print-principles",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_principles,
            help="Print the principles of --principles default, as a start for a file, and exit.",
        ),
        principle_flags,
        click.option(
            "--answers-from",
            type=FOLDER,
            metavar=RESPONDER,
            help="Pairs by a teacher: its answers are chosen, the model's own answers rejected. A "
            f"run, a model, or {AN_ADDRESS}.",
        ),
    ):
        command = decorate(command)
    return command


class JudgeFlags(NamedTuple):
    """The flags of a judge, and the settings of the connection to models at addresses."""

    reward: str | None
    judge: str | None
    rubric: str | None
    connection: "Connection"

    @property
    def is_given(self) -> bool:
        """Whether there is a reward or a judge."""
        return (self.reward or self.judge) is not None


@dataclass(frozen=True, kw_only=True)
class ContrastiveFlags:
    """The flags of contrastive pairs (principles, system prompts, a teacher) and of their judge."""

    answers_from: str | None
    principles: str | None
    revisions: int | None
    revision_temperature: float | None
    critic: str | None
    system_chosen: str | None
    system_rejected: str | None
    judging: JudgeFlags

    @property
    def method(self) -> str | None:
        """Flag that makes the better answer; None if there is none."""
        given = (name for name in METHODS if getattr(self, name) is not None)
        return next(("--" + name.replace("_", "-") for name in given), None)

    @property
    def is_automatic(self) -> bool:
        """Whether no person ranks the answers."""
        return self.method is not None or self.judging.is_given

    def check(self) -> None:
        """Check that the flags fit together, without loading anything.

        Raises:
            ConfigError: two flags contradict each other, or one has no effect.
        """
        for name, needed in (
            ("revisions", "principles"),
            ("revision_temperature", "principles"),
            ("critic", "principles"),
            ("system_rejected", "system_chosen"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                flag = "--" + needed.replace("_", "-")
                raise ConfigError(f"`{name}` has no effect without {flag}")
        methods = [name for name in METHODS if getattr(self, name) is not None]
        if len(methods) > 1:
            raise ConfigError(f"`{methods[1]}` has no effect with {self.method}; leave out one")
        from mlx_dpo.collect.principles.judge import check_principle_judge
        from mlx_dpo.evaluation.judge import check_judge

        by_principles = self.principles is not None
        check = check_principle_judge if by_principles else check_judge
        check(*self.judging[:3])


def check_single(
    method: str, runs: tuple[str, ...] = (), samplings: tuple[Sampling, ...] = ()
) -> None:
    """Raise `ConfigError` if flags ask for more than the two answers of a method."""
    source = click.get_current_context().get_parameter_source("answers")
    if source is ParameterSource.COMMANDLINE:
        raise ConfigError(f"`answers` has no effect with {method}, which makes two per prompt")
    for name, values in (("run", runs), ("temperature", samplings)):
        if len(values) > 1:
            raise ConfigError(f"{method} takes one {name}, got {len(values)}; leave out the others")


# Makes, of what answers and its prompts: their sampler, the rule of its pairs, and the judge.
Opener = Callable[["Responder", "list[Prompt]"], "tuple[AnswerSampler, PairRule, Judge | None]"]


def collect_contrastive_pairs(
    flags: ContrastiveFlags,
    runs: tuple[str, ...],
    model: str | None,
    prompts: str,
    output: str,
    sampling: Sampling,
) -> None:
    """Collect contrastive pairs by principles, system prompts or a teacher; print the results."""
    from mlx_dpo.collect.contrastive_pairs import ContrastiveTaskSampler, collect_contrastive
    from mlx_dpo.collect.sample import JUDGE_CHUNK, open_responders
    from mlx_dpo.data.prompts import add_system_prompt, read_prompts

    read_method = {
        "--principles": _read_principles,
        "--system-chosen": _read_systems,
        "--answers-from": _name_teacher,
    }[flags.method or ""]
    open_method = read_method(flags, sampling)
    pairs_file = open_pairs_file(output)
    prompt_list = read_prompts(prompts)
    [responder] = open_responders(runs, model)
    prompt_list = add_system_prompt(prompt_list, responder.system)
    sample_answers, rule, judge = open_method(responder, prompt_list)
    tasks = ContrastiveTaskSampler(
        prompt_list, pairs_file, sample_answers, rule, chunk_size=JUDGE_CHUNK
    )
    print_resumed(tasks)
    run_with_progress(tasks, collect_contrastive(tasks, judge))
    print_summary(pairs_file)


def _read_principles(flags: ContrastiveFlags, sampling: Sampling) -> Opener:
    """Read the principles; the returned function opens critic and judge."""
    from mlx_dpo.collect.principles.judge import judge_drawn, open_principle_judge
    from mlx_dpo.collect.principles.principle_set import PrincipleDraw, read_principles
    from mlx_dpo.collect.principles.revise import REVISION_RULE, SENT_TO_CRITIC, Reviser
    from mlx_dpo.saved_runs.respond import open_any_responder

    assert flags.principles is not None
    draw = PrincipleDraw(
        read_principles(flags.principles),
        1 if flags.revisions is None else flags.revisions,
        sampling.seed or 0,
    )

    def open_method(
        responder: "Responder", prompts: "list[Prompt]"
    ) -> "tuple[AnswerSampler, PairRule, Judge | None]":
        print_responder_notes([responder], prompts, sampling.max_tokens)
        critic = None
        if flags.critic is not None:
            connection = flags.judging.connection
            critic = open_any_responder(flags.critic, connection, sends=SENT_TO_CRITIC)
        for note in critic.notes if critic else ():
            echo(note, err=True)
        judge = open_principle_judge(*flags.judging, responder)
        if not flags.judging.is_given:
            echo(f"Judge: {judge.name}, which judges its own answers by the principles", err=True)
        reviser = Reviser(responder, draw, sampling, critic, flags.revision_temperature or 0.0)
        return reviser, REVISION_RULE, judge_drawn(judge, draw)

    return open_method


def _read_systems(flags: ContrastiveFlags, sampling: Sampling) -> Opener:
    """Read the system prompts; the returned function opens the judge, if there is one."""
    from mlx_dpo.collect.system_contrast import SystemContrast, SystemPrompts
    from mlx_dpo.evaluation.judge import open_judge
    from mlx_dpo.saved_runs.respond import check_system_prompt

    systems = SystemPrompts(
        read_system_prompt(flags.system_chosen or "", "system_chosen"),
        None
        if flags.system_rejected is None
        else read_system_prompt(flags.system_rejected, "system_rejected"),
    )

    def open_method(
        responder: "Responder", prompts: "list[Prompt]"
    ) -> "tuple[AnswerSampler, PairRule, Judge | None]":
        for name, system in (
            ("system_chosen", systems.chosen),
            ("system_rejected", systems.rejected),
        ):
            if system is not None:
                check_system_prompt(responder, prompts[0], system, name)
        print_responder_notes([responder], systems.apply(prompts), sampling.max_tokens)
        judge = open_judge(*flags.judging) if flags.judging.is_given else None
        return SystemContrast(responder, sampling, systems), systems.rule, judge

    return open_method


def _name_teacher(flags: ContrastiveFlags, sampling: Sampling) -> Opener:
    """Return a function that opens the teacher, and the judge if there is one."""
    from mlx_dpo.collect.teacher import SENT_TO_TEACHER, TEACHER_RULE, TeacherContrast
    from mlx_dpo.evaluation.judge import open_judge
    from mlx_dpo.saved_runs.respond import open_any_responder

    assert flags.answers_from is not None
    spec = flags.answers_from

    def open_method(
        responder: "Responder", prompts: "list[Prompt]"
    ) -> "tuple[AnswerSampler, PairRule, Judge | None]":
        teacher = open_any_responder(spec, flags.judging.connection, sends=SENT_TO_TEACHER)
        print_responder_notes([responder, teacher], prompts, sampling.max_tokens)
        judge = open_judge(*flags.judging) if flags.judging.is_given else None
        return TeacherContrast(responder, teacher, sampling), TEACHER_RULE, judge

    return open_method
