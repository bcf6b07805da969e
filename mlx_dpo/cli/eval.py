"""`mlx-dpo eval`: measure a run on held-out pairs, texts and benchmark tasks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.cli.drift_flags import drift_flags, prepare_drift_of
from mlx_dpo.cli.measurement_flags import measurement_flags, prepare_measurements
from mlx_dpo.cli.metric_thresholds import check_thresholds, parse_thresholds, threshold_flags
from mlx_dpo.cli.output import echo, echo_json
from mlx_dpo.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_dpo.evaluation.measurements.measurement import Measure, Measurement
    from mlx_dpo.saved_runs.evaluate import Evaluation
    from mlx_dpo.saved_runs.open import OpenRun


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo eval run                          on its held-out pairs",
        "mlx-dpo eval run new.jsonl                on other pairs",
        "mlx-dpo eval run --perplexity book.txt    on a text, before and after",
        "mlx-dpo eval run --reference-answers qa.jsonl",
        "mlx-dpo eval run --tasks arc_easy,piqa    on benchmarks of lm-eval",
        "mlx-dpo eval run --drift                  what else training changed",
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
@measurement_flags
@drift_flags
@threshold_flags
@click.option("--no-save", is_flag=True, help="Do not store the results in RUN/evaluations.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def eval(
    run: str,
    pairs: str | None,
    bad_pairs: str | None,
    no_save: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Evaluate the policy of RUN against its reference.

    By default the run's held-out pairs are evaluated, or PAIRS: a file, or a folder or dataset on
    the Hub, of which the held-out split is used. Loss, rewards, margins, accuracies and
    log-probabilities are means over pairs, with TRL's metric names.

    Base and aligned model are measured on one set of weights. The results are stored in
    RUN/evaluations as JSON.
    """
    thresholds = parse_thresholds(flags["fail_below"], flags["fail_above"])
    measures = _prepare(flags, pairs, bad_pairs)

    from mlx_dpo.evaluation.measurements.measurement import measure_run
    from mlx_dpo.saved_runs.open import open_run

    if bad_pairs is not None and measures and pairs is None:
        raise ConfigError("`--bad-pairs` has no effect without PAIRS")
    evaluation = _evaluate_pairs(run, pairs, bad_pairs) if pairs or not measures else None
    measurements: list[Measurement] = []
    model_notes: tuple[str, ...] = ()
    if measures:
        model, measurements = measure_run(run, measures)
        model_notes = model.notes
    opened = open_run(run) if evaluation is None else evaluation.run
    if not no_save:
        _save(opened, evaluation, measurements)
    if as_json:
        facts = {"run": run, "finished": opened.finished}
        echo_json(facts | _to_record(evaluation, measurements))
    else:
        _print(evaluation, measurements, model_notes, is_named=pairs is not None)
    check_thresholds(thresholds, _to_record(evaluation, measurements))


def _prepare(flags: dict[str, Any], pairs: str | None, bad_pairs: str | None) -> "list[Measure]":
    """Return the measurements that the flags ask for; files are read, and no model is loaded."""
    measures = prepare_measurements(flags)
    if (drift := prepare_drift_of(flags, pairs, bad_pairs)) is not None:
        measures.append(drift)
    return measures


def _evaluate_pairs(run: str, pairs: str | None, bad_pairs: str | None) -> "Evaluation":
    from mlx_dpo import evaluate_run

    return evaluate_run(run, pairs, bad_pairs=bad_pairs)


def _public_row(evaluation: "Evaluation") -> dict[str, float]:
    from mlx_dpo.losses.metrics import EVAL_PREFIX, to_public_names

    return to_public_names(evaluation.metrics, prefix=EVAL_PREFIX)


def _save(
    opened: "OpenRun", evaluation: "Evaluation | None", measurements: "Sequence[Measurement]"
) -> None:
    """Store the results in the run folder; if that fails, they are printed all the same."""
    from mlx_dpo.evaluation.measurements.measurement import PairsMeasurement, to_stored
    from mlx_dpo.saved_runs.stored_evaluations import save_evaluation

    results = list(measurements)
    if evaluation is not None:
        results.insert(0, PairsMeasurement(evaluation, _public_row(evaluation)))
    try:
        for result in results:
            save_evaluation(opened.paths, to_stored(opened, result))
    except RunError as error:
        echo(f"Warning: the results are not stored: {error}", err=True)


def _to_record(
    evaluation: "Evaluation | None", measurements: "Sequence[Measurement]"
) -> dict[str, Any]:
    """Return all results: those on pairs at the top, others by the names of measurements."""
    record: dict[str, Any] = {}
    if evaluation is not None:
        verdict = evaluation.verdict
        record |= {"pairs": evaluation.pairs, "of": evaluation.name, "notes": evaluation.notes}
        record["verdict"] = verdict and verdict.to_dict()
        record |= _public_row(evaluation)
    for result in measurements:
        facts = {"settings": dict(result.settings), "notes": list(result.notes)}
        record[result.name] = result.to_dict() | facts
    return record


def _print(
    evaluation: "Evaluation | None",
    measurements: "Sequence[Measurement]",
    model_notes: Sequence[str],
    *,
    is_named: bool,
) -> None:
    from mlx_dpo.reporting.evaluations.findings import read_findings
    from mlx_dpo.reporting.evaluations.result_tables import make_tables
    from mlx_dpo.reporting.terminal.console import make_console, print_label_table
    from mlx_dpo.reporting.terminal.result_tables import to_rich_table

    console = make_console()
    if evaluation is not None:
        _print_evaluation(console, evaluation, is_named=is_named)
    for note in model_notes:
        echo(note, err=True)
    for result in measurements:
        for note in result.notes:
            console.print(note)
        results = result.to_dict()
        for table in make_tables(result.name, result.subject, results):
            console.print(to_rich_table(table))
        print_label_table(console, [(f.label, f.text) for f in read_findings(results)])


def _print_evaluation(console: "Console", evaluation: "Evaluation", *, is_named: bool) -> None:
    from mlx_dpo.reporting.metrics_text import final_metrics_table
    from mlx_dpo.reporting.terminal.console import print_label_table
    from mlx_dpo.runs.summary import summarize_findings
    from mlx_dpo.training.monitor.verdict import describe_result

    row, verdict, opened = _public_row(evaluation), evaluation.verdict, evaluation.run
    if not opened.finished:
        console.print(f"The run is unfinished; these are its adapters of {opened.adapter}")
    for note in evaluation.notes:
        console.print(note)
    title = evaluation.description
    is_noise = verdict is not None and verdict.is_noise
    console.print(final_metrics_table(row, title=title, is_noise=is_noise))
    before = None if is_named else opened.record.get("before")
    result = describe_result(verdict, row, title, before)
    print_label_table(console, summarize_findings(opened.record["warnings"], result))
