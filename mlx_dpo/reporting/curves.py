"""Select and smooth the metrics that charts show; the module `plots` draws the charts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mlx_dpo.losses.metrics import EVAL_PREFIX, METRICS
from mlx_dpo.types import MetricsRow

CHOSEN, REJECTED = "chosen", "rejected"
X_AXES = {"step": "step", "epoch": "epoch", "tokens": "num_tokens"}  # name: key of a metrics row
WINDOWS_PER_RUN = 25  # a trailing mean covers 1/25 of the run
MIN_POINTS_TO_SMOOTH = 50  # shorter lines have no trailing mean
MAX_POINTS = 600  # of a line; more cannot be distinguished in a chart


class Line(NamedTuple):
    """A line of a chart: N values of a metric of one run, with their x coordinates."""

    run: int  # index of the run
    completion: str  # `CHOSEN`, `REJECTED`, or "" for a metric of the pair
    held_out: bool
    x: Sequence[float]  # (N,)
    y: Sequence[float]  # (N,)
    smoothed: Sequence[float]  # (N,) trailing means of y; y itself if the line is not smoothed
    is_downsampled: bool = False  # every point is the mean of several neighbours


class Chart(NamedTuple):
    """A chart: its title, its unit, and the lines to draw in it."""

    title: str
    unit: str
    meaning: str
    baseline: float | None  # value of the reference model, or of chance
    lines: Sequence[Line]
    starts_at_zero: bool = False  # for metrics that cannot be negative


class Curve(NamedTuple):
    """The definition of a chart: its title and unit, and the metrics to draw in it."""

    title: str
    unit: str
    meaning: str
    metrics: Mapping[str, str]  # completion ("" for the pair): key of a metrics row
    baseline: float | None = None
    is_noisy: bool = True  # a trailing mean is drawn as well
    on_model_card: bool = True
    starts_at_zero: bool = False


def _metrics(field: str) -> dict[str, str]:
    """Return the name of the logged metric of a curve with one unlabelled line, as {"": name}."""
    return {"": METRICS[field].name}


def _completion_metrics(kind: str) -> dict[str, str]:
    """Return the `metrics` of a curve with a chosen and a rejected line; `kind` is e.g. `logps`."""
    completions = (CHOSEN, REJECTED)
    return {completion: METRICS[f"{completion}_{kind}"].name for completion in completions}


CURVES = (
    Curve("Loss", "", "training loss; lower is better", _metrics("loss")),
    Curve(
        "Margin",
        "nats",
        "reward of chosen minus reward of rejected",
        _metrics("margins"),
        baseline=0.0,
    ),
    Curve(
        "Accuracy",
        "share",
        "pairs with the higher reward for chosen, or labelled completions rewarded correctly",
        _metrics("accuracies"),
        baseline=0.5,
    ),
    Curve(
        "Rewards",
        "nats",
        "β × log-ratio to the reference, or the loss's own implicit reward",
        _completion_metrics("rewards"),
        baseline=0.0,
    ),
    Curve(
        "Log-probabilities",
        "nats per completion",
        "mean log-probability of a whole completion",
        _completion_metrics("logps"),
    ),
    Curve("KL", "nats", "estimated KL divergence from the reference", _metrics("kl"), baseline=0.0),
    Curve(
        "Lengths",
        "tokens",
        "mean length of the scored completions",
        _completion_metrics("tokens"),
        on_model_card=False,
    ),
    Curve(
        "Margin and length",
        "correlation",
        "correlation of margin and length difference; near 1 or -1 the policy learns length",
        _metrics("length_correlation"),
        baseline=0.0,
        on_model_card=False,
    ),
    Curve(
        "Repetition",
        "share",
        "repeated 4-grams in answers sampled at evaluations",
        {"": "completions/repetition"},
        starts_at_zero=True,
        on_model_card=False,
    ),
    Curve(
        "KL of answers",
        "nats per token",
        "estimated KL divergence from the base, on answers sampled at evaluations",
        {"": "completions/kl"},
        baseline=0.0,
        on_model_card=False,
    ),
    Curve("Gradient norm", "", "before clipping", {"": "grad_norm"}, starts_at_zero=True),
    Curve(
        "Learning rate",
        "",
        "after warm-up and decay",
        {"": "learning_rate"},
        is_noisy=False,
        on_model_card=False,
    ),
    Curve(
        "Speed",
        "tokens per second",
        "without padding",
        {"": "tokens_per_second"},
        on_model_card=False,
        starts_at_zero=True,
    ),
    Curve(
        "Memory",
        "GB",
        "peak memory of MLX so far",
        {"": "peak_memory_gb"},
        is_noisy=False,
        on_model_card=False,
        starts_at_zero=True,
    ),
    Curve(
        "Padding",
        "share of tokens",
        "padding tokens among all tokens of the forward passes",
        {"": "padding_share"},
        on_model_card=False,
        starts_at_zero=True,
    ),
)


def make_charts(
    runs: Sequence[Sequence[MetricsRow]], *, x_axis: str = "step", for_model_card: bool = False
) -> list[Chart]:
    """Return the charts of one or several runs; charts without any values are left out.

    Args:
        runs: metrics rows of each run, in the order of steps.
        x_axis: a key of `X_AXES`.
        for_model_card: return only the charts that a model card shows.
    """
    charts = []
    for curve in CURVES:
        lines = [
            line for run, rows in enumerate(runs) for line in _make_lines(run, rows, curve, x_axis)
        ]
        if lines and (curve.on_model_card or not for_model_card):
            charts.append(
                Chart(
                    curve.title,
                    curve.unit,
                    curve.meaning,
                    curve.baseline,
                    lines,
                    curve.starts_at_zero,
                )
            )
    return charts


def _make_lines(run: int, rows: Sequence[MetricsRow], curve: Curve, x_axis: str) -> Iterator[Line]:
    # An evaluation row has a step, but no epoch or token count: the step's training row has both.
    x_of_step = {row["step"]: row[X_AXES[x_axis]] for row in rows if X_AXES[x_axis] in row}
    for completion, metric in curve.metrics.items():
        for prefix in ("", EVAL_PREFIX):
            key = prefix + metric
            points = [
                (x_of_step[row["step"]], row[key])
                for row in rows
                if key in row and row["step"] in x_of_step
            ]
            if points:
                yield _make_line(run, completion, points, curve, held_out=bool(prefix))


def _make_line(
    run: int, completion: str, points: list[tuple[float, float]], curve: Curve, *, held_out: bool
) -> Line:
    """Return a line through the points, with trailing means if the metric is noisy.

    Training lines of more than `MAX_POINTS` points are downsampled.
    """
    count = len(points)
    group = 1 if held_out else -(-count // MAX_POINTS)  # neighbours per point
    starts = range(0, count, group)
    x, y = (
        [_mean(values[start : start + group]) for start in starts]
        for values in zip(*points, strict=True)
    )
    smoothed = y
    if curve.is_noisy and not held_out and count >= MIN_POINTS_TO_SMOOTH:
        ends = [min(start + group, count) for start in starts]
        smoothed = trailing_mean([y for _, y in points], window_size(count), ends)
    return Line(run, completion, held_out, x, y, smoothed, group > 1)


def window_size(points: int) -> int:
    """Return how many values each trailing mean averages, for a line of `points` points."""
    return max(5, points // WINDOWS_PER_RUN)


def trailing_mean(values: Sequence[float], window: int, ends: Iterable[int]) -> list[float]:
    """Return the mean of the last `window` values before each index in `ends`."""
    return [_mean(values[max(0, end - window) : end]) for end in ends]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # `fmean` raises for infinities of both signs
