"""`mlx-dpo winrate`: how often a run's answers are preferred to those of what it started from."""

import json
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.sampling_flags import answer_flags, judge_flags, samplings

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_dpo.evaluation.winrate import PairwiseComparison


@click.command()
@click.argument("run")
@click.argument("prompts", required=False)
@click.option(
    "--against", metavar="RUN|MODEL", help="The other side. [default: what RUN started from]"
)
@judge_flags
@answer_flags(temperature=0.7)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
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
    """Have answers of RUN judged against those of its reference, on PROMPTS or those it held out.

    The interval of 95 % is Wilson's; a tie is half a win. The length-controlled rate is that at
    equal length, by a logistic regression as AlpacaEval 2 has it (arXiv:2404.04475). A judge
    model reads both orders; where they disagree, the answers tie.

    \b
    mlx-dpo winrate run --reward rewards.py:courtesy
    mlx-dpo winrate run prompts.txt --judge mlx-community/Qwen3-8B-4bit
    """
    [sampling] = samplings(settings)

    from mlx_dpo.evaluation.judge import open_judge
    from mlx_dpo.evaluation.winrate import compare_policies
    from mlx_dpo.reporting.console import make_console

    opened = open_judge(reward, judge, rubric)
    held = compare_policies(run, opened, sampling, prompts=prompts, against=against)
    for note in held.notes:
        click.echo(note, err=True)
    if as_json:
        facts = {"run": run, "against": against, **opened.facts()}
        click.echo(json.dumps(facts | held.to_dict(), ensure_ascii=False))
        return
    make_console().print(_table(held, against or "what it started from"))


def _table(held: "PairwiseComparison", against: str) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    rate = held.rate
    table = Table(
        title=f"{len(held.prompts):,} prompts, against {against}",
        title_justify="left",
        show_header=False,
        box=SIMPLE,
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_row("win rate", f"{rate.rate:.1%}")
    table.add_row("95 % interval (Wilson)", f"{rate.low:.1%} to {rate.high:.1%}")
    controlled = rate.length_controlled
    table.add_row("at equal length", "-" if controlled is None else f"{controlled:.1%}")
    table.add_row("won, tied, lost", f"{rate.wins:,}, {rate.ties:,}, {rate.losses:,}")
    for doubt, count in held.doubts.items():
        table.add_row(doubt, f"{count:,}")
    if held.rewards is not None:
        table.add_row("mean reward", "{:.3f} against {:.3f}".format(*held.rewards))
    table.add_row("characters an answer", "{:.0f} against {:.0f}".format(*held.lengths))
    return table
