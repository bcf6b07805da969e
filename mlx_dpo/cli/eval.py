"""`mlx-dpo eval`: measure a run on held-out pairs."""

import click

from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.cli.output import echo_json


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo eval run               on the run's held-out pairs",
        "mlx-dpo eval run new.jsonl     on other pairs",
    ),
)
@click.argument("run", type=FOLDER)
@click.argument("pairs", required=False, type=FILE)
@click.option(
    "--bad-pairs",
    type=click.Choice(["error", "drop"]),
    help="What to do with pairs of PAIRS that cannot be scored.",
    show_default="as in the run",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def eval(run: str, pairs: str | None, bad_pairs: str | None, as_json: bool) -> None:
    """Evaluate the policy of RUN against its reference, on PAIRS or on its held-out pairs.

    PAIRS is a file, or a folder or dataset on the Hub, of which the held-out split is used.

    Loss, rewards, margins, accuracies and log-probabilities are means over pairs, with TRL's
    metric names.
    """
    from mlx_dpo import evaluate_run
    from mlx_dpo.losses.metrics import EVAL_PREFIX, to_public_names
    from mlx_dpo.reporting.metrics_text import final_metrics_table
    from mlx_dpo.reporting.terminal.console import make_console, print_label_table
    from mlx_dpo.runs.summary import summarize_findings
    from mlx_dpo.training.monitor.verdict import describe_result

    evaluation = evaluate_run(run, pairs, bad_pairs=bad_pairs)
    row = to_public_names(evaluation.metrics, prefix=EVAL_PREFIX)
    verdict = evaluation.verdict
    if as_json:
        facts = {"pairs": evaluation.pairs, "of": evaluation.name, "notes": evaluation.notes}
        facts["verdict"] = verdict and verdict.to_dict()
        record = {"run": run, "finished": evaluation.run.finished, **facts, **row}
        echo_json(record)
        return
    console = make_console()
    if not evaluation.run.finished:
        console.print(f"The run is unfinished; these are its adapters of {evaluation.run.adapter}")
    for note in evaluation.notes:
        console.print(note)
    title = evaluation.description
    is_noise = verdict is not None and verdict.is_noise
    console.print(final_metrics_table(row, title=title, is_noise=is_noise))
    before = evaluation.run.record.get("before") if pairs is None else None
    result = describe_result(verdict, row, title, before)
    print_label_table(console, summarize_findings(evaluation.run.record["warnings"], result))
