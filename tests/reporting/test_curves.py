"""What is drawn: the right values at the right place, of everything that a run measures."""

import math

import pytest

from mlx_dpo.losses.metrics import NAMES, step_row
from mlx_dpo.reporting import curves
from mlx_dpo.reporting.curves import AXES, CURVES, MOST, SMOOTHED, charts, trailing_mean, window
from mlx_dpo.types import PreferenceMetrics, StepMetrics


def step(number, **metrics):
    return {"step": number, "epoch": number / 10, "num_tokens": 100 * number, **metrics}


def only(runs, title, **asked):
    [chart] = [chart for chart in charts(runs, **asked) if chart.title == title]
    return chart


def test_whatever_a_run_measures_is_drawn_or_is_what_it_is_drawn_over():
    everything = PreferenceMetrics(*[0.0] * len(PreferenceMetrics._fields))
    row = step_row(StepMetrics(1, 0.1, everything, 1.0, 1e-5, 10, 0.0))
    assert len(everything) == len(NAMES)
    timed = {"tokens_per_second", "peak_memory_gb"}
    drawn = {name for curve in CURVES for name in curve.names.values()}
    assert row.keys() | timed == drawn | set(AXES.values())


def test_a_mean_goes_over_what_came_before_and_never_over_what_comes_later():
    """By hand, over three."""
    values = [3.0, 5.0, 1.0, 9.0, 2.0]
    assert trailing_mean(values, 3, range(1, 6)) == [3.0, 4.0, 3.0, 5.0, 4.0]
    assert trailing_mean(values, 3, [2, 4]) == [4.0, 5.0]
    assert trailing_mean(values[:2], 1, [1, 2]) == [3.0, 5.0]


def test_noisy_curves_of_long_runs_alone_have_a_mean():
    rows = [step(n, loss=(-1.0) ** n, learning_rate=0.5 * n) for n in range(1, SMOOTHED + 1)]
    rows.append({"step": SMOOTHED, "eval_loss": 7.0})
    assert window(SMOOTHED) == 5 and window(1000) == 40
    train, held_out = only([rows], "Loss").lines
    assert train.mean[4] == pytest.approx(-1 / 5) and train.y[4] == -1.0
    assert (held_out.x, held_out.y, held_out.mean) == ([SMOOTHED], [7.0], [7.0])
    [rate] = only([rows], "Learning rate").lines
    assert rate.mean == rate.y == [row["learning_rate"] for row in rows[:-1]]
    [short, _] = only([rows[1:]], "Loss").lines
    assert short.mean == short.y


@pytest.mark.parametrize(("along", "x"), [("step", 20), ("epoch", 2.0), ("tokens", 2000)])
def test_an_evaluation_stands_where_its_step_stands(along, x):
    rows = [step(n, loss=1.0) for n in (10, 20, 30)]
    rows.insert(2, {"step": 20, "eval_loss": 3.0})
    train, held_out = only([rows], "Loss", along=along).lines
    assert (held_out.x, held_out.y) == ([x], [3.0])
    assert train.x[1] == x and len(train.x) == 3


def test_many_points_become_means_of_neighbours_and_the_last_one_is_kept():
    """5,000 steps are 556 groups of nine, the last one of five."""
    rows = [step(n, loss=float(n)) for n in range(1, 5001)]
    [line] = only([rows], "Loss").lines
    assert len(line.x) == len(line.y) == len(line.mean) == 556 <= MOST
    assert line.y[0] == line.x[0] == 5.0 and line.y[-1] == 4998.0
    assert line.mean[-1] == pytest.approx(5000 - (window(5000) - 1) / 2)
    rows += [{"step": n, "eval_loss": float(n)} for n in range(1, 5001)]
    assert len(only([rows], "Loss").lines[1].x) == 5000


def test_parts_and_runs_are_told_apart_and_what_a_run_has_not_is_left_out():
    rows = [step(1, loss=0.5, **{"rewards/chosen": 1.0, "rewards/rejected": -1.0})]
    other = [step(1, loss=0.7, kl=0.2)]
    found = {chart.title: chart for chart in charts([rows, other])}
    assert list(found) == ["Loss", "Rewards", "KL"]
    assert [(line.run, line.y) for line in found["Loss"].lines] == [(0, [0.5]), (1, [0.7])]
    assert [(line.part, line.y) for line in found["Rewards"].lines] == [
        ("chosen", [1.0]), ("rejected", [-1.0]),
    ]  # fmt: skip
    assert [line.run for line in found["KL"].lines] == [1]
    assert charts([[]]) == []


def test_a_card_gets_what_tells_of_the_result_and_not_of_the_machine():
    rows = [step(1, loss=0.5, grad_norm=1.0, peak_memory_gb=1.0, tokens_per_second=9.0)]
    assert [chart.title for chart in charts([rows], headline=True)] == ["Loss", "Gradient norm"]


def test_a_value_that_is_no_number_stays_where_it_is():
    rows = [step(n, loss=math.nan if n == 2 else 1.0) for n in (1, 2, 3)]
    [line] = only([rows], "Loss").lines
    assert math.isnan(line.y[1]) and line.y[::2] == [1.0, 1.0]
    assert line.mean == line.y  # or each step would be drawn behind itself


def test_infinities_of_both_signs_have_a_mean_that_is_no_number():
    rows = [step(n, loss=math.inf * (-1) ** n) for n in range(1, SMOOTHED + 1)]
    [line] = only([rows], "Loss").lines
    assert line.mean[0] == -math.inf and all(map(math.isnan, line.mean[1:]))


def test_the_last_of_many_steps_is_not_drawn_behind_what_is_not_noisy():
    rows = [step(n, learning_rate=float(n)) for n in range(1, 2 * MOST + 1)]
    [line] = only([rows], "Learning rate").lines
    assert line.mean == line.y == [2 * n + 1.5 for n in range(MOST)]


def test_an_evaluation_whose_step_is_gone_has_no_place_along_epochs():
    rows = [step(1, loss=1.0), {"step": 2, "eval_loss": 3.0}]
    assert len(only([rows], "Loss", along="step").lines) == 2
    assert len(only([rows], "Loss", along="epoch").lines) == 1


def test_the_work_grows_no_faster_than_the_run(monkeypatch):
    """Values that means are taken of, a step of the run."""
    taken = []
    monkeypatch.setattr(curves, "sum", lambda v: taken.append(len(v)) or sum(v), raising=False)
    for count in (5_000, 50_000):
        charts([[step(n, loss=1.0) for n in range(1, count + 1)]])
        assert sum(taken) < 30 * count
        taken.clear()
