"""Select and smooth the metrics that charts show; the module `plots` draws the charts."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mlx_dpo.losses.metrics import EVAL_PREFIX, METRICS
from mlx_dpo.types import MetricsRow

CHOSEN, REJECTED = "chosen", "rejected"
RESULTS, DETAILS, MACHINE = "results", "details", "machine"  # sections of the report page
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
    smoothed: Sequence[float]  # (N,) trailing means of y; the same object if it is not smoothed
    is_downsampled: bool = False  # every point is the mean of several neighbours


class Curve(NamedTuple):
    """The definition of a chart: its title and unit, and the metrics to draw in it."""

    title: str
    unit: str
    caption: str  # how to read the chart
    metrics: Mapping[str, str]  # completion ("" for the pair): key of a metrics row
    baseline: float | None = None  # value of the reference model, or of chance
    is_noisy: bool = True  # a trailing mean is drawn as well
    on_model_card: bool = True
    starts_at_zero: bool = False  # for metrics that cannot be negative
    section: str = DETAILS  # of the report page


class Chart(NamedTuple):
    """A chart: its definition, and the lines to draw in it."""

    curve: Curve
    lines: Sequence[Line]


def _metrics(field: str) -> dict[str, str]:
    """Return the name of the logged metric of a curve with one unlabelled line, as {"": name}."""
    return {"": METRICS[field].name}


def _completion_metrics(kind: str) -> dict[str, str]:
    """Return the `metrics` of a curve with a chosen and a rejected line; `kind` is e.g. `logps`."""
    completions = (CHOSEN, REJECTED)
    return {completion: METRICS[f"{completion}_{kind}"].name for completion in completions}


CURVES = (
    Curve(
        "Loss",
        "",
        "DPO starts at log 2 ≈ 0.693, where policy and reference agree; instruction tuning starts "
        "at the cross-entropy per token of the untrained model. If the held-out line rises while "
        "the training line falls, the policy memorizes its pairs.",
        _metrics("loss"),
        section=RESULTS,
    ),
    Curve(
        "Token accuracy",
        "share",
        "Scored tokens that the policy ranks first, given the tokens before them.",
        _metrics("mean_token_accuracy"),
        section=RESULTS,
    ),
    Curve(
        "Margin",
        "nats",
        "Reward of chosen minus reward of rejected: how much more the policy prefers chosen than "
        "the reference does. At 0 nothing was learned.",
        _metrics("margins"),
        baseline=0.0,
        section=RESULTS,
    ),
    Curve(
        "Accuracy",
        "share",
        "Pairs in which chosen has the higher reward. Chance is 0.5, and while the margin is near "
        "0 even a high share is chance.",
        _metrics("accuracies"),
        baseline=0.5,
        section=RESULTS,
    ),
    Curve(
        "Log-probabilities",
        "nats per completion",
        "In preference training rejected should fall. If chosen falls with it, the policy makes "
        "both less likely (likelihood displacement).",
        _completion_metrics("logps"),
        section=RESULTS,
    ),
    Curve(
        "Margin of best and worst",
        "nats",
        "For ranked lists: reward of the best completion minus reward of the worst.",
        _metrics("best_worst_margins"),
        baseline=0.0,
    ),
    Curve(
        "Rewards",
        "nats",
        "β × log-ratio to the reference, or the implicit reward of the loss. Above 0: more likely "
        "than before training.",
        _completion_metrics("rewards"),
        baseline=0.0,
    ),
    Curve(
        "KL",
        "nats",
        "Estimated distance from the reference, on the completions of the data set.",
        _metrics("kl"),
        baseline=0.0,
    ),
    Curve(
        "Repetition",
        "share",
        "Repeated 4-grams in answers sampled at evaluations; a quarter or more is degenerate.",
        {"": "completions/repetition"},
        starts_at_zero=True,
        on_model_card=False,
    ),
    Curve(
        "KL of answers",
        "nats per token",
        "Estimated distance from the base model, on the policy's own sampled answers.",
        {"": "completions/kl"},
        baseline=0.0,
        on_model_card=False,
    ),
    Curve(
        "Margin and length",
        "correlation",
        "Correlation of the margin with the difference in length. Near 1 or -1 the policy learns "
        "length instead of the preference.",
        _metrics("length_correlation"),
        baseline=0.0,
        on_model_card=False,
    ),
    Curve(
        "Gradient norm",
        "",
        "Before clipping. Spikes that grow are an early sign of a learning rate that is too large.",
        {"": "grad_norm"},
        starts_at_zero=True,
    ),
    Curve(
        "Learning rate",
        "",
        "Rises in the warm-up, then follows the schedule.",
        {"": "learning_rate"},
        is_noisy=False,
        on_model_card=False,
    ),
    Curve(
        "Lengths",
        "tokens",
        "Mean length of the scored completions: a property of the pairs, not of the policy.",
        _completion_metrics("tokens"),
        on_model_card=False,
    ),
    Curve(
        "Speed",
        "tokens per second",
        "Tokens of the pairs per second of training, without padding.",
        {"": "tokens_per_second"},
        on_model_card=False,
        starts_at_zero=True,
        section=MACHINE,
    ),
    Curve(
        "Memory",
        "GB",
        "Peak of MLX's memory since the start.",
        {"": "peak_memory_gb"},
        is_noisy=False,
        on_model_card=False,
        starts_at_zero=True,
        section=MACHINE,
    ),
    Curve(
        "Padding",
        "share of tokens",
        "Tokens computed for nothing; 0 where pairs are packed into one sequence.",
        {"": "padding_share"},
        on_model_card=False,
        starts_at_zero=True,
        section=MACHINE,
    ),
)
LineKey = tuple[str, str, bool]  # title of the curve, completion, held out


class GrowingLine:
    """A line to which points are appended; all points but the last stay as they are.

    Neighbouring points of a long line are averaged, so that it has at most `MAX_POINTS`.

    Args:
        line: The line, without points.
        count: Number of points that the line will have.
        is_noisy: Whether the line is smoothed if it is long enough.
    """

    def __init__(self, line: Line, count: int, *, is_noisy: bool) -> None:
        self._line = line
        self._group_size = 1 if line.held_out else -(-count // MAX_POINTS)  # neighbours per point
        self._group: list[tuple[float, float]] = []
        is_smoothed = is_noisy and not line.held_out and count >= MIN_POINTS_TO_SMOOTH
        self._recent = deque[float](maxlen=window_size(count)) if is_smoothed else None
        self._x: list[float] = []
        self._y: list[float] = []
        self._smoothed: list[float] = [] if is_smoothed else self._y

    @property
    def num_points(self) -> int:
        """Number of points, the last one of which may still change."""
        return len(self._x) + bool(self._group)

    @property
    def num_final(self) -> int:
        """Number of points that no later value changes."""
        return len(self._x)

    def append(self, x: float, y: float) -> None:
        """Append a value, with which the last point may become complete."""
        self._group.append((x, y))
        if self._recent is not None:
            self._recent.append(y)
        if len(self._group) == self._group_size:
            for values, value in self._last_point():
                values.append(value)
            self._group.clear()

    def _last_point(self) -> list[tuple[list[float], float]]:
        """Return each list of coordinates with its value for the last point."""
        x, y = (_mean(values) for values in zip(*self._group, strict=True))
        point = [(self._x, x), (self._y, y)]
        return point if self._recent is None else [*point, (self._smoothed, _mean(self._recent))]

    def points(self, start: int = 0) -> Line:
        """Return the line from its point `start` on."""
        x, y, smoothed = self._x[start:], self._y[start:], self._smoothed[start:]
        if self._group:
            last = [value for _, value in self._last_point()]
            x, y, smoothed = [*x, last[0]], [*y, last[1]], [*smoothed, last[-1]]
        return self._line._replace(
            x=x,
            y=y,
            smoothed=y if self._recent is None else smoothed,
            is_downsampled=self._group_size > 1,
        )


class RunLines:
    """All lines of a run, which grow with its metrics rows.

    Args:
        run: Index of the run.
        num_steps: Number of training rows that the run will have.
        x_axis: A key of `X_AXES`.
    """

    def __init__(self, run: int, *, num_steps: int, x_axis: str = "step") -> None:
        self._x_key = X_AXES[x_axis]
        self._x_of_step: dict[float, float] = {0: 0}
        self._lines: dict[LineKey, tuple[str, GrowingLine]] = {}
        for curve in CURVES:
            for completion, metric in curve.metrics.items():
                for held_out in (False, True):
                    line = Line(run, completion, held_out, (), (), ())
                    self._lines[curve.title, completion, held_out] = (
                        metric,
                        GrowingLine(line, max(1, num_steps), is_noisy=curve.is_noisy),
                    )

    def append(self, row: MetricsRow) -> None:
        """Add the values of a metrics row to the lines."""
        # An evaluation row has a step, but no epoch or token count: the step's training row has.
        if self._x_key in row:
            self._x_of_step[row["step"]] = row[self._x_key]
        if (x := self._x_of_step.get(row["step"])) is None:
            return
        for (_, _, held_out), (metric, line) in self._lines.items():
            if (key := EVAL_PREFIX + metric if held_out else metric) in row:
                line.append(x, row[key])

    @property
    def growing(self) -> list[tuple[LineKey, GrowingLine]]:
        """All lines by key, in an order that does not depend on the rows."""
        return [(key, line) for key, (_, line) in self._lines.items()]

    @property
    def drawn(self) -> list[tuple[LineKey, GrowingLine]]:
        """Lines that have points, by key."""
        return [(key, line) for key, line in self.growing if line.num_points]


def make_charts(
    runs: Sequence[Sequence[MetricsRow]],
    *,
    x_axis: str = "step",
    for_model_card: bool = False,
    total_steps: Sequence[int] | None = None,
) -> list[Chart]:
    """Return the charts of one or several runs; charts without any values are left out.

    Args:
        runs: metrics rows of each run, in the order of steps.
        x_axis: a key of `X_AXES`.
        for_model_card: return only the charts that a model card shows.
        total_steps: number of steps that each run will have; by default those in `runs`.
    """
    lines = []
    for run, rows in enumerate(runs):
        taken = len([row for row in rows if "eval_loss" not in row])
        growing = RunLines(run, num_steps=max(taken, (total_steps or {run: 0})[run]), x_axis=x_axis)
        for row in rows:
            growing.append(row)
        lines += [(key[0], line.points()) for key, line in growing.drawn]
    return [
        Chart(curve, drawn)
        for curve in CURVES
        if (curve.on_model_card or not for_model_card)
        and (drawn := [line for title, line in lines if title == curve.title])
    ]


def window_size(points: int) -> int:
    """Return how many values each trailing mean averages, for a line of `points` points."""
    return max(5, points // WINDOWS_PER_RUN)


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)  # `fmean` raises for infinities of both signs
