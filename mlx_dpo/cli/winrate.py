"""`mlx-dpo winrate`: compute the win rate of a run against its reference or another model."""

from dataclasses import fields
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.cli.judge_flags import (
    AN_ADDRESS,
    RESPONDER,
    connection_flags,
    judge_flags,
    make_connection,
)
from mlx_dpo.cli.output import echo, echo_json
from mlx_dpo.cli.sampling_flags import (
    DEFAULT_SEED,
    make_samplings,
    sampling_flags,
)
from mlx_dpo.cli.system_prompt import METAVAR, read_system_prompt
from mlx_dpo.cli.winrate_person import PersonFlags, judge_by_person, person_flags

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_dpo.config.sampling import Sampling
    from mlx_dpo.evaluation.winrate import AnswersOfBoth, PairwiseComparison
    from mlx_dpo.openai_client.connection import Connection

MAX_SYSTEM = 50  # characters of a system prompt in a title


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo winrate run --reward rewards.py:courtesy",
        "mlx-dpo winrate run prompts.txt --judge mlx-community/Qwen3-8B-4bit",
        'mlx-dpo winrate run --judge MODEL --against-system "Be brief and kind."',
        "mlx-dpo winrate run prompts.txt --person --decisions votes.jsonl --rater ann",
    ),
    aliases={"--prompts": ""},
)
@click.argument("run", type=FOLDER)
@click.argument("prompts", required=False, type=FILE)
@click.option(
    "--against",
    type=FOLDER,
    metavar=RESPONDER,
    help=f"Opponent of RUN: a run, a model, or {AN_ADDRESS}.",
    show_default="the reference of RUN",
)
@click.option(
    "--against-system",
    metavar=METAVAR,
    help="System prompt of the opponent, to see whether a prompt alone does as well.",
)
@judge_flags
@person_flags
@connection_flags
@sampling_flags(
    temperature=0.7, seed=DEFAULT_SEED, remarks={"temperature": "The default is that of `chat`."}
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def winrate(
    run: str,
    prompts: str | None,
    against: str | None,
    reward: str | None,
    judge: str | None,
    rubric: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Judge answers of RUN against those of its reference, on PROMPTS or the held-out prompts.

    PROMPTS is a file of prompts or of pairs, also given as --prompts FILE.

    The 95 % interval is Wilson's; a tie is half a win. The length-controlled rate is the win rate
    at equal length by a logistic regression, as in AlpacaEval 2 (arXiv:2404.04475). A judge model
    is prompted with both orders of the two answers; if its verdicts disagree, the answers tie.

    With --person, you judge the answers in random order, at the terminal or with --web in a
    browser. Every decision is saved at once, and the same command resumes. With several --rater,
    the table also has their agreement.
    """
    flags = PersonFlags(**{field.name: settings.pop(field.name) for field in fields(PersonFlags)})
    flags.check({"reward": reward, "judge": judge, "rubric": rubric}, prompts)
    against_system = settings.pop("against_system")
    if against_system is None:
        system = None
    else:
        system = read_system_prompt(against_system, "against_system")
    connection = make_connection(settings, judge, against)
    [sampling] = make_samplings(settings)
    if flags.person:
        answer = partial(_answer_with_both, run, sampling, prompts, (against, system), connection)
        opponent = against if system is None else _describe(against, system)
        judge_by_person(flags, run, opponent, prompts, sampling, answer, as_json=as_json)
        return

    from mlx_dpo.evaluation.judge import open_judge
    from mlx_dpo.evaluation.winrate import compare_policies

    opened_judge = open_judge(reward, judge, rubric, connection)
    comparison = compare_policies(
        run,
        opened_judge,
        sampling,
        prompts=prompts,
        against=against,
        against_system=system,
        connection=connection,
    )
    facts = {"run": run, "against": against, "against_system": system}
    facts |= opened_judge.provenance()
    _print_comparison(comparison, _describe(against, system), facts if as_json else None)


def _print_comparison(
    comparison: "PairwiseComparison", opponent: str, facts: dict[str, Any] | None
) -> None:
    """Print notes and a table; with `facts`, one JSON object that begins with them instead."""
    from mlx_dpo.reporting.terminal.console import make_console

    for note in comparison.notes:
        echo(note, err=True)
    if (score := comparison.common_reward) is not None:
        echo(
            f"Warning: the reward gave every answer the same score ({score}), so the win rate says "
            "nothing; use another reward or other prompts",
            err=True,
        )
    if facts is None:
        make_console().print(_table(comparison, opponent))
    else:
        echo_json(facts | comparison.to_dict())


def _describe(against: str | None, system: str | None) -> str:
    """Return the opponent's name for a title; different system prompts have different names."""
    name = against or "its reference"
    if system is None:
        return name
    line = " ".join(system.split())
    if len(line) > MAX_SYSTEM:
        line = f"{line[:MAX_SYSTEM]}…” ({sha256(system.encode()).hexdigest()[:8]})"
        return f"{name} with the system prompt “{line}"
    return f"{name} with the system prompt “{line}”"


def _answer_with_both(
    run: str,
    sampling: "Sampling",
    prompts: str | None,
    opponent: tuple[str | None, str | None],
    connection: "Connection",
) -> "AnswersOfBoth":
    """Generate the answers that a person judges, and print the notes of loading the models."""
    from mlx_dpo.evaluation.winrate import answer_with_both

    against, system = opponent
    both = answer_with_both(
        run,
        sampling,
        prompts=prompts,
        against=against,
        against_system=system,
        connection=connection,
    )
    for note in both.notes:
        echo(note, err=True)
    return both


def _table(comparison: "PairwiseComparison", against: str) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    rate = comparison.rate
    table = Table(
        title=f"{len(comparison.prompts):,} prompts, against {against}",
        title_justify="left",
        show_header=False,
        box=SIMPLE,
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_row("win rate", f"{rate.rate:.1%}")
    table.add_row("95 % interval (Wilson)", f"{rate.low:.1%} to {rate.high:.1%}")
    controlled = rate.length_controlled
    table.add_row("length-controlled", "-" if controlled is None else f"{controlled:.1%}")
    table.add_row("won, tied, lost", f"{rate.wins:,}, {rate.ties:,}, {rate.losses:,}")
    for warning, count in comparison.warnings.items():
        table.add_row(warning, f"{count:,}")
    if comparison.rewards is not None:
        table.add_row("mean reward", "{:.3f} against {:.3f}".format(*comparison.rewards))
    table.add_row("characters per answer", "{:.0f} against {:.0f}".format(*comparison.mean_lengths))
    return table
