"""Tables of the results of `mlx-dpo eval`, for the terminal, the report and the model card.

A function takes the results of a measurement as JSON values, new or stored in a run folder.
"""

from collections.abc import Callable, Sequence

from mlx_dpo.reporting.evaluations.drift_tables import drift_tables
from mlx_dpo.reporting.evaluations.table import Results, ResultTable
from mlx_dpo.units import format_items

TableMaker = Callable[[str, Results], list[ResultTable]]


def perplexity_tables(subject: str, results: Results) -> list[ResultTable]:
    """Return the table of perplexities before and after training."""
    base, aligned = results["base"], results["aligned"]
    labels = {
        "perplexity per token": "token_perplexity",
        "perplexity per byte": "byte_perplexity",
        "bits per byte": "bits_per_byte",
    }
    rows = [
        (label, f"{base[key]:.4f}", f"{aligned[key]:.4f}", _change(base[key], aligned[key]))
        for label, key in labels.items()
    ]
    title = f"Perplexity of {subject} ({results['tokens']:,} tokens)"
    return [ResultTable(title, ("base", "aligned", "change"), rows)]


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.2%}"


def task_tables(subject: str, results: Results) -> list[ResultTable]:
    """Return the table of benchmark metrics before and after training, with standard errors.

    Published numbers compare only with the same examples and template, so both are shown.
    """
    rows = [
        (
            f"{task} {metric}",
            _with_error(results["base"].get(task, {}), metric),
            _with_error(metrics, metric),
            _difference(results["difference"].get(task, {}).get(metric)),
        )
        for task, metrics in results["aligned"].items()
        for metric in metrics
        if "_stderr" not in metric
    ]
    template = "with" if results["apply_chat_template"] else "without"
    documents, examples = (
        _range([facts.get(name) for facts in results["tasks"].values()])
        for name in ("documents", "num_fewshot")
    )
    title = (
        f"Benchmarks: {subject} (lm-eval {results['lm-eval']}, {template} chat template; "
        f"documents per task: {documents}, examples per prompt: {examples})"
    )
    return [ResultTable(title, ("base", "aligned", "difference (95 %)"), rows)]


def _range(counts: Sequence[int | None]) -> str:
    """Return the smallest and the largest count; groups of tasks have none of their own."""
    known = [count for count in counts if count is not None]
    low, high = min(known, default=0), max(known, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _with_error(metrics: Results, metric: str) -> str:
    """Return a metric with its standard error, such as `0.4500 ± 0.0157`."""
    if metric not in metrics:
        return "-"
    name, comma, kind = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{kind}")
    return f"{metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _difference(found: Results | None) -> str:
    """Return a paired difference with its interval, such as `+0.020 (-0.010 to +0.050)`."""
    if found is None:
        return "-"
    interval = found["interval_95"]
    shown = "" if interval is None else " ({:+.3f} to {:+.3f})".format(*interval)
    return f"{found['mean']:+.3f}{shown}"


def reference_tables(subject: str, results: Results) -> list[ResultTable]:
    """Return the table of agreement with reference answers, before and after training."""
    base, aligned, difference = results["base"], results["aligned"], results["difference"]
    rows = [
        (label, f"{base[key]:.4f}", f"{aligned[key]:.4f}", _difference(difference[key]))
        for label, key in (("ROUGE-L F1", "rouge_l"), ("exact match", "exact_match"))
    ]
    rows.append(("cut answers", f"{base['cut_answers']:,}", f"{aligned['cut_answers']:,}", ""))
    title = f"Reference answers of {subject} ({format_items(results['rows'], 'rows')})"
    return [ResultTable(title, ("base", "aligned", "difference (95 %)"), rows)]


TABLES: dict[str, TableMaker] = {
    "drift": drift_tables,
    "perplexity": perplexity_tables,
    "reference_answers": reference_tables,
    "tasks": task_tables,
}


def make_tables(measurement: str, subject: str, results: Results) -> list[ResultTable]:
    """Return the tables of a measurement's results; none for a measurement without tables."""
    maker = TABLES.get(measurement)
    return [] if maker is None else maker(subject, results)
