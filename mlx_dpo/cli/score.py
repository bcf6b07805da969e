"""`mlx-dpo score`: score answers with a run as reward model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE, FOLDER
from mlx_dpo.cli.output import echo, echo_json
from mlx_dpo.cli.setting_flags import SettingsCommand, setting_flags, typed_settings
from mlx_dpo.config.dpo_config import get_settings
from mlx_dpo.phases import phase

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_dpo.data.report import PairsReport
    from mlx_dpo.data.sources import Source
    from mlx_dpo.saved_runs.implicit_rewards import ImplicitRewards
    from mlx_dpo.saved_runs.score_rows import RewardSummary, RewardTotals, ScoredRow

ROW_FLAGS = [get_settings()[name] for name in ("schema", "column")]


@click.command(
    cls=SettingsCommand,
    examples=(
        "mlx-dpo score run pairs.jsonl -o scored.jsonl",
        "mlx-dpo score run reward-bench.parquet --json",
        "mlx-dpo score run answers.jsonl > scored.jsonl",
    ),
)
@click.argument("run", type=FOLDER)
@click.argument("rows", type=FILE)
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="FILE",
    help="New `.jsonl` file to write.",
    show_default="print the rows",
)
@click.option(
    "--split",
    metavar="SPLIT",
    help="Split of a folder or of a dataset on the Hub.",
    show_default="the held-out split",
)
@click.option(
    "--bad-pairs",
    type=click.Choice(["error", "drop"]),
    help="What to do with rows that cannot be scored.",
    show_default="as in the run",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary alone, as a JSON object.")
@setting_flags(lambda spec: spec in ROW_FLAGS, shows_required=False)
@click.pass_context
def score(
    ctx: click.Context,
    /,
    run: str,
    rows: str,
    output: str | None,
    split: str | None,
    bad_pairs: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Score the answers in ROWS with RUN as reward model: the implicit rewards of DPO.

    ROWS is a file, or a folder or dataset on the Hub, of which the held-out split is read. A row is
    a pair or one answer, such as `prompt` and `completion`. Each is printed as a line of JSON, a
    pair with `reward_chosen`, `reward_rejected` and `reward_margin`, an answer with `reward`. A
    summary on stderr has the accuracy: the share of pairs whose chosen answer has the higher
    reward, also for each value of the column `subset`, as in RewardBench.

    The reward is beta (log π − log π_ref), arXiv:2305.18290, Eq. 5; that of a reference-free loss
    is the loss's own. Texts are encoded as in training, but never truncated: rows that do not fit
    the model's context are left out and counted. Columns are read as in the run's training.
    """
    from mlx_dpo.data.inspect.raw_rows import check_new_path, open_new_file
    from mlx_dpo.data.sources import resolve_held_out_source, resolve_source
    from mlx_dpo.data.tokenization.tokenize_rows import check_any_pair
    from mlx_dpo.saved_runs.implicit_rewards import open_implicit_rewards
    from mlx_dpo.saved_runs.score_rows import RewardSummary

    typed = typed_settings(ctx, flags)
    path = None if output is None else Path(output).expanduser()
    if path is not None:
        check_new_path(path)
    source = resolve_held_out_source(rows) if split is None else resolve_source(rows, split)
    rewards = open_implicit_rewards(run)
    for note in rewards.notes:
        echo(note, err=True)
    report, scored = _open_rows(rewards, source, typed, bad_pairs)
    summary, left_out = RewardSummary(), Counter[str]()
    with ExitStack() as stack:
        stream = None if path is None else stack.enter_context(open_new_file(path))
        advance = stack.enter_context(phase("Scoring rows", unit="rows"))
        for row in scored:
            summary.add(row)
            if stream is not None or not as_json:
                left_out.update(_write(row, stream))
            advance(1)
        check_any_pair(report)
    for line in _notes(report, left_out):
        echo(line, err=True)
    facts = {"run": run, "rows": source.name, **rewards.provenance()}
    facts["left_out"] = {reason: len(found) for reason, found in report.dropped.items()}
    _print_summary(summary, facts, as_json=as_json, to_stderr=path is None)


def _open_rows(
    rewards: "ImplicitRewards", source: "Source", typed: dict[str, Any], bad_pairs: str | None
) -> "tuple[PairsReport, Iterator[ScoredRow]]":
    """Return a report on the rows, which counts while they are scored, and the scored rows."""
    from mlx_dpo.data.tokenization.tokenize_rows import new_report
    from mlx_dpo.runs.inputs import row_rules
    from mlx_dpo.saved_runs.score_rows import score_rows

    config = rewards.config
    columns = replace(config, column=typed.get("column", config.column)).columns
    rules = replace(
        row_rules(config), schema=typed.get("schema", config.schema), renamed=columns, judged=False
    )
    report = new_report(source.name, rewards.rules, rules)
    bad_pairs = bad_pairs or config.bad_pairs
    return report, score_rows(rewards, source.rows(), rules, report, bad_pairs=bad_pairs)


def _write(row: "ScoredRow", stream: IO[bytes] | None) -> list[str]:
    """Write a row with its rewards; return the names of columns that JSON cannot hold."""
    from mlx_dpo.data.inspect.raw_rows import RawRow, write_row

    whole = row.with_rewards()
    raw = RawRow(whole.location, whole)
    if stream is not None:
        return write_row(stream, raw)
    left_out = raw.columns_of_bytes()
    echo_json({name: value for name, value in whole.record.items() if name not in left_out})
    return left_out


def _notes(report: "PairsReport", left_out: Counter[str]) -> list[str]:
    """Return what the rows lost on the way: dropped ones, and columns that hold bytes."""
    lines = report.warning_lines()
    return lines + [
        f"column `{name}` is left out of {count:,} row{'s' * (count != 1)}: it holds bytes, which "
        "JSON cannot"
        for name, count in left_out.items()
    ]


def _print_summary(
    summary: "RewardSummary", facts: dict[str, Any], *, as_json: bool, to_stderr: bool
) -> None:
    from mlx_dpo.reporting.terminal.console import make_console, make_status_console

    if as_json:
        subsets = {name: _figures(totals) for name, totals in summary.subsets.items()}
        echo_json(facts | _figures(summary.total) | ({"subsets": subsets} if subsets else {}))
        return
    console = make_status_console() if to_stderr else make_console()
    console.print(f"reward: {facts['reward_formula']}")
    total = summary.total
    if total.pairs:
        console.print(_table(summary))
    if total.ties:
        console.print(f"{total.ties:,} of the pairs have equal rewards; they count as not correct")
    if total.answers:
        console.print(f"mean reward of {total.answers:,} single answers: {total.mean_reward:.3f}")


def _figures(totals: "RewardTotals") -> dict[str, Any]:
    """Return the counts, accuracy and means as JSON values, but nothing of no rows."""
    from mlx_dpo.evaluation.winrate import wilson_interval

    figures: dict[str, Any] = {}
    if totals.pairs:
        figures = {
            "pairs": totals.pairs,
            "accuracy": totals.accuracy,
            "interval_95": list(wilson_interval(totals.correct, totals.pairs)),
            "interval": "Wilson",
            "ties": totals.ties,
            "mean_margin": totals.mean_margin,
        }
    if totals.answers:
        figures |= {"answers": totals.answers, "mean_reward": totals.mean_reward}
    return figures


def _table(summary: "RewardSummary") -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    from mlx_dpo.evaluation.winrate import wilson_interval

    table = Table("subset", box=SIMPLE)
    for title in ("pairs", "accuracy", "95 % interval (Wilson)", "mean margin"):
        table.add_column(title, justify="right")
    for name, totals in {**summary.subsets, "all": summary.total}.items():
        if not totals.pairs:
            continue
        low, high = wilson_interval(totals.correct, totals.pairs)
        table.add_row(
            name,
            f"{totals.pairs:,}",
            f"{totals.accuracy:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{totals.mean_margin:.3f}",
        )
    return table
