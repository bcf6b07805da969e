"""Metrics of a run as text: a step, an evaluation, and the final table."""

from rich.box import SIMPLE
from rich.table import Table

from mlx_dpo.losses.metrics import EVAL_PREFIX, METRICS
from mlx_dpo.types import MetricsRow

# Label and key of an evaluation row: the metrics that are better in one direction.
FINAL_METRICS = tuple(
    (metric.label, EVAL_PREFIX + metric.name) for metric in METRICS.values() if metric.better
)
TOKEN_ACCURACY = METRICS["mean_token_accuracy"].name
# Only runs on ranked lists have the first, and only instruction tuning has the second.
OPTIONAL = (EVAL_PREFIX + METRICS["best_worst_margins"].name, EVAL_PREFIX + TOKEN_ACCURACY)

ZERO_MARGIN = 0.0005  # is shown as 0.000
# Label, key of an evaluation row and format of the metrics of sampled answers.
SAMPLE_METRICS = (
    ("tokens per answer", f"{EVAL_PREFIX}completions/mean_length", ".1f"),
    ("answers cut", f"{EVAL_PREFIX}completions/clipped_ratio", ".0%"),
    ("4-gram repetition", f"{EVAL_PREFIX}completions/repetition", ".1%"),
    ("KL from base, per token", f"{EVAL_PREFIX}completions/kl", ".3f"),
)


def format_step(row: MetricsRow, total: int) -> str:
    """Return a training metrics row as one line of text; `total` is the run's number of steps."""
    texts = [f"step {int(row['step']):>{len(str(total))}}/{total}", *step_texts(row)]
    return "  ".join(texts)


def step_texts(row: MetricsRow) -> list[str]:
    """Return the metrics of a training metrics row as texts, the most important first."""
    return [
        f"loss {row['loss']:.4f}",
        *_preference_texts(row, "", ".0%"),
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens_per_second']:,.0f} tok/s",
        f"{row['peak_memory_gb']:.2f} GB",
    ]


def format_evaluation(row: MetricsRow) -> str:
    """Return an evaluation metrics row as one line of text."""
    return f"held out after step {int(row['step'])}: {'  '.join(evaluation_texts(row))}"


def evaluation_texts(row: MetricsRow) -> list[str]:
    """Return the metrics of an evaluation metrics row as texts, the most important first."""
    return [
        f"loss {row['eval_loss']:.4f}",
        *_preference_texts(row, EVAL_PREFIX, ".1%"),
        *_sample_texts(row),
    ]


def _preference_texts(row: MetricsRow, prefix: str, form: str) -> list[str]:
    """Return margin and accuracy as texts, or the token accuracy of instruction tuning."""
    if (key := prefix + TOKEN_ACCURACY) in row:
        return [f"token accuracy {row[key]:{form}}"]
    accuracy = _format_accuracy(row, prefix, form)
    return [
        f"margin {_format_metric(row, f'{prefix}rewards/margins', '+.3f')}",
        f"accuracy {accuracy if prefix else accuracy.rjust(4)}",  # steps stand in columns
    ]


def _sample_texts(row: MetricsRow) -> list[str]:
    """Return repetition and KL divergence of sampled answers; none if none were sampled."""
    names = (("repetition", ".0%"), ("kl", ".3f"))
    return [
        f"{name} {row[key]:{form}}"
        for name, form in names
        if (key := f"{EVAL_PREFIX}completions/{name}") in row
    ]


NOISE = "not meaningful"  # instead of an accuracy whose margins are noise


def format_final_metrics(row: MetricsRow, *, is_noise: bool = False) -> dict[str, str]:
    """Return an evaluation's final metrics as a mapping from label to formatted number.

    With `is_noise` the margins are noise, and accuracy is not shown as a result.
    """
    formats = {"accuracy": ".1%", "token accuracy": ".1%"}
    is_supervised = EVAL_PREFIX + TOKEN_ACCURACY in row
    texts = {
        label: _format_metric(row, key, formats.get(label, ".4f"))
        for label, key in FINAL_METRICS
        if key in row or not (is_supervised or key in OPTIONAL)
    }
    texts |= {label: format(row[key], form) for label, key, form in SAMPLE_METRICS if key in row}
    return texts | {"accuracy": NOISE} if is_noise else texts


def final_metrics_table(
    row: MetricsRow, *, title: str, is_noise: bool = False, before: MetricsRow | None = None
) -> Table:
    """Return a table for the terminal with the metrics of an evaluation.

    Args:
        row: the evaluation.
        title: title of the table.
        is_noise: whether the margins are noise, so that accuracy is no result.
        before: the evaluation before the first step, for a column of its own.
    """
    table = Table(title=title, title_justify="left", show_header=before is not None, box=SIMPLE)
    table.add_column()
    columns = [format_final_metrics(row, is_noise=is_noise)]
    if before is not None:
        columns.insert(0, _format_metrics_before({**before, **_base_samples(row)}))
    for name in ("before", "after")[-len(columns) :]:
        table.add_column(name, justify="right")
    for label in columns[-1]:
        table.add_row(label, *(column.get(label, "-") for column in columns))
    return table


def _format_metrics_before(row: MetricsRow) -> dict[str, str]:
    """Return the metrics before the first step; without any margin there is no accuracy."""
    texts = format_final_metrics(row)
    if "accuracy" not in texts:
        return texts
    return texts | {"accuracy": _format_accuracy(row, EVAL_PREFIX, ".1%")}


def _base_samples(row: MetricsRow) -> MetricsRow:
    """Return the metrics of the base model's sampled answers under the names of the policy's."""
    base, prefix = f"{EVAL_PREFIX}completions/base_", f"{EVAL_PREFIX}completions/"
    return {name.replace(base, prefix): row[name] for name in row if name.startswith(base)}


def _format_accuracy(row: MetricsRow, prefix: str, form: str) -> str:
    """Return the accuracy, or "-" if the margin is shown as zero: then there is no preference."""
    if abs(row.get(f"{prefix}rewards/margins", 1.0)) < ZERO_MARGIN:
        return "-"
    return format(row[f"{prefix}rewards/accuracies"], form)


def _format_metric(row: MetricsRow, key: str, form: str) -> str:
    """Return the metric `key` in the number format `form`, or "-" if the row does not have it.

    For example, the row has no margin if all rows of labelled data have the same label.
    """
    return format(row[key], form) if key in row else "-"
