"""Training curves: every metric of a run has a chart with the right points."""

import math

import pytest

from mlx_dpo.losses.metrics import METRICS, step_row
from mlx_dpo.reporting import curves
from mlx_dpo.reporting.curves import (
    CURVES,
    MAX_POINTS,
    MIN_POINTS_TO_SMOOTH,
    X_AXES,
    RunLines,
    make_charts,
    window_size,
)
from mlx_dpo.types import PreferenceMetrics, StepMetrics


def step(number, **metrics):
    return {"step": number, "epoch": number / 10, "num_tokens": 100 * number, **metrics}


def make_chart(runs, title, **options):
    [chart] = [chart for chart in make_charts(runs, **options) if chart.curve.title == title]
    return chart


def test_every_metric_of_a_row_is_in_a_chart_or_an_x_axis():
    metrics = PreferenceMetrics(*[0.0] * len(PreferenceMetrics._fields))
    row = step_row(StepMetrics(1, 0.1, metrics, 1.0, 1e-5, 10, 0.0))
    assert len(metrics) == len(METRICS)
    timed = {"tokens_per_second", "peak_memory_gb"}
    drawn = {name for curve in CURVES for name in curve.metrics.values()}
    errors = {"rewards/margins_stderr"}  # of a metric that is drawn
    sampled = {"completions/repetition", "completions/kl"}  # in rows of evaluations
    assert row.keys() | timed | sampled == drawn | errors | set(X_AXES.values())


def test_a_trailing_mean_covers_earlier_values_only():
    """Expected values were computed by hand, with a window of 5."""
    rows = [step(n, loss=y) for n, y in enumerate([3.0, 5.0, 1.0, 9.0, 2.0, 8.0], start=1)]
    [line] = make_chart([rows], "Loss", total_steps=[50]).lines
    assert line.smoothed == [3.0, 4.0, 3.0, 4.5, 4.0, 5.0]
    assert line.y == [3.0, 5.0, 1.0, 9.0, 2.0, 8.0]


def test_only_noisy_curves_of_long_runs_are_smoothed():
    rows = [
        step(n, loss=(-1.0) ** n, learning_rate=0.5 * n) for n in range(1, MIN_POINTS_TO_SMOOTH + 1)
    ]
    rows.append({"step": MIN_POINTS_TO_SMOOTH, "eval_loss": 7.0})
    assert window_size(MIN_POINTS_TO_SMOOTH) == 5 and window_size(1000) == 40
    train, held_out = make_chart([rows], "Loss").lines
    assert train.smoothed[4] == pytest.approx(-1 / 5) and train.y[4] == -1.0
    assert (held_out.x, held_out.y, held_out.smoothed) == ([MIN_POINTS_TO_SMOOTH], [7.0], [7.0])
    [rate] = make_chart([rows], "Learning rate").lines
    assert rate.smoothed == rate.y == [row["learning_rate"] for row in rows[:-1]]
    [short, _] = make_chart([rows[1:]], "Loss").lines
    assert short.smoothed == short.y


@pytest.mark.parametrize(("x_axis", "x"), [("step", 20), ("epoch", 2.0), ("tokens", 2000)])
def test_an_evaluation_has_the_x_value_of_its_step(x_axis, x):
    rows = [step(n, loss=1.0) for n in (10, 20, 30)]
    rows.insert(2, {"step": 20, "eval_loss": 3.0})
    train, held_out = make_chart([rows], "Loss", x_axis=x_axis).lines
    assert (held_out.x, held_out.y) == ([x], [3.0])
    assert train.x[1] == x and len(train.x) == 3


def test_long_runs_are_downsampled_to_means_of_neighbouring_steps():
    """5,000 steps are 556 groups of nine, the last one of five."""
    rows = [step(n, loss=float(n)) for n in range(1, 5001)]
    [line] = make_chart([rows], "Loss").lines
    assert len(line.x) == len(line.y) == len(line.smoothed) == 556 <= MAX_POINTS
    assert line.y[0] == line.x[0] == 5.0 and line.y[-1] == 4998.0
    assert line.smoothed[-1] == pytest.approx(5000 - (window_size(5000) - 1) / 2)
    rows += [{"step": n, "eval_loss": float(n)} for n in range(1, 5001)]
    assert len(make_chart([rows], "Loss").lines[1].x) == 5000


def test_every_run_and_completion_has_a_line_and_missing_metrics_have_none():
    rows = [step(1, loss=0.5, **{"rewards/chosen": 1.0, "rewards/rejected": -1.0})]
    other = [step(1, loss=0.7, kl=0.2)]
    by_title = {chart.curve.title: chart for chart in make_charts([rows, other])}
    assert list(by_title) == ["Loss", "Rewards", "KL"]
    assert [(line.run, line.y) for line in by_title["Loss"].lines] == [(0, [0.5]), (1, [0.7])]
    assert [(line.completion, line.y) for line in by_title["Rewards"].lines] == [
        ("chosen", [1.0]), ("rejected", [-1.0]),
    ]  # fmt: skip
    assert [line.run for line in by_title["KL"].lines] == [1]
    assert make_charts([[]]) == []


def test_a_model_card_has_no_charts_about_the_machine():
    rows = [step(1, loss=0.5, grad_norm=1.0, peak_memory_gb=1.0, tokens_per_second=9.0)]
    assert [chart.curve.title for chart in make_charts([rows], for_model_card=True)] == [
        "Loss",
        "Gradient norm",
    ]


def test_nan_stays_at_its_step():
    rows = [step(n, loss=math.nan if n == 2 else 1.0) for n in (1, 2, 3)]
    [line] = make_chart([rows], "Loss").lines
    assert math.isnan(line.y[1]) and line.y[::2] == [1.0, 1.0]
    assert line.smoothed == line.y  # equal, so that the line is not drawn twice


def test_the_mean_of_infinities_of_both_signs_is_nan():
    rows = [step(n, loss=math.inf * (-1) ** n) for n in range(1, MIN_POINTS_TO_SMOOTH + 1)]
    [line] = make_chart([rows], "Loss").lines
    assert line.smoothed[0] == -math.inf and all(map(math.isnan, line.smoothed[1:]))


def test_a_downsampled_line_without_noise_is_not_smoothed():
    rows = [step(n, learning_rate=float(n)) for n in range(1, 2 * MAX_POINTS + 1)]
    [line] = make_chart([rows], "Learning rate").lines
    assert line.smoothed == line.y == [2 * n + 1.5 for n in range(MAX_POINTS)]


def test_an_evaluation_without_a_training_row_has_no_epoch():
    rows = [step(1, loss=1.0), {"step": 2, "eval_loss": 3.0}]
    assert len(make_chart([rows], "Loss", x_axis="step").lines) == 2
    assert len(make_chart([rows], "Loss", x_axis="epoch").lines) == 1


def test_the_cost_of_smoothing_is_linear_in_the_steps(monkeypatch):
    """Count the values that are summed for means, per step of the run."""
    lengths = []
    monkeypatch.setattr(curves, "sum", lambda v: lengths.append(len(v)) or sum(v), raising=False)
    for count in (5_000, 50_000):
        make_charts([[step(n, loss=1.0) for n in range(1, count + 1)]])
        assert sum(lengths) < 30 * count
        lengths.clear()


@pytest.mark.parametrize("count", [7, 49, 50, 1300])
def test_a_growing_run_has_the_charts_of_the_finished_one_up_to_its_last_point(count):
    """A page that shows a run in training must not have to draw earlier points again."""
    rows = [step(n, loss=math.sin(n), learning_rate=1 / n) for n in range(1, count + 1)]
    rows.insert(5, {"step": 5, "eval_loss": 2.0})
    final = {key: line.points() for key, line in grow(rows, count).drawn}
    for seen in (3, 6, count // 2, count):
        for key, line in grow(rows[:seen], count).drawn:
            part, whole = line.points(), final[key]
            for name in ("x", "y", "smoothed"):
                values = getattr(part, name)[: line.num_final]
                assert values == getattr(whole, name)[: line.num_final]
            assert line.num_points == len(part.x)
            assert line.num_final in (line.num_points, line.num_points - 1)
            start = line.num_final
            assert line.points(start).x == part.x[start:]
    [loss, _] = make_chart([rows], "Loss").lines
    assert final["Loss", "", False] == loss


def grow(rows, count):
    lines = RunLines(0, num_steps=count)
    for row in rows:
        lines.append(row)
    return lines


def test_an_evaluation_before_the_first_step_is_drawn_at_zero():
    rows = [{"step": 0, "eval_loss": 0.69}, step(1, loss=0.7)]
    for x_axis in X_AXES:
        _, held_out = make_chart([rows], "Loss", x_axis=x_axis).lines
        assert (held_out.x, held_out.y) == ([0], [0.69])
