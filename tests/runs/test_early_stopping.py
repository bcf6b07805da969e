import math

import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.losses.metrics import METRICS
from mlx_dpo.runs.early_stopping import BestState, EarlyStopping


def watched(metric="loss", patience=None, threshold=None):
    return EarlyStopping.by(metric, patience=patience, threshold=threshold)


def evaluations(*values, name="eval_loss"):
    """One every ten steps, between rows of steps."""
    rows = []
    for number, value in enumerate(values, start=1):
        rows += [{"step": 10 * number, "loss": 0.0}, {"step": 10 * number, name: value}]
    return rows


def stood(*values, **more):
    judge = watched(**more)
    return judge.standing(evaluations(*values, name=judge.name))


def test_the_least_loss_and_the_highest_of_others_is_the_best():
    assert stood(3.0, 1.0, 2.0) == BestState(20, 1.0, waited=1)
    assert stood(0.5, 0.25, 0.75, metric="rewards/accuracies") == BestState(30, 0.75)
    assert stood(-1.0, -2.0, metric="eval_rewards/rejected") == BestState(20, -2.0)


def test_a_tie_is_no_improvement():
    assert stood(1.0, 1.0, 1.0) == BestState(10, 1.0, waited=2)


def test_patience_counts_evaluations_in_a_row():
    judge = watched(patience=2)
    assert not judge.is_over(judge.standing(evaluations(1.0, 2.0)))
    assert judge.is_over(judge.standing(evaluations(1.0, 2.0, 2.0)))
    assert not judge.is_over(judge.standing(evaluations(1.0, 2.0, 0.5, 2.0)))
    assert not watched().is_over(BestState(10, 1.0, waited=99))


def test_a_gain_within_the_threshold_is_the_best_but_patience_goes_on():
    """As in Transformers, where the best is taken by itself. Steps of 0.25 against 0.25."""
    assert stood(1.0, 0.75, 0.5, threshold=0.25, patience=9) == BestState(30, 0.5, waited=2)
    assert stood(1.0, 0.5, threshold=0.25, patience=9) == BestState(20, 0.5, waited=0)


def test_what_is_no_number_is_never_the_best():
    assert stood(math.nan) == stood() == BestState()
    assert stood(math.nan, 1.0, math.nan) == BestState(20, 1.0, waited=1)


def test_going_on_stands_where_never_stopping_stood():
    judge, rows = watched(patience=3), evaluations(3.0, 1.0, 2.0, 0.5, 0.6, 0.7)
    for cut in range(len(rows)):
        now = judge.standing(rows[:cut])
        for row in rows[cut:]:
            now = judge.after(now, row)
        assert now == judge.standing(rows)


@pytest.mark.parametrize("metric", ["accuracy", "eval_eval_loss", "kl", ""])
def test_a_metric_without_a_better_and_worse_is_refused_with_those_that_have_one(metric):
    with pytest.raises(ConfigError) as error:
        watched(metric)
    assert "must be one of logps/chosen, logps/rejected, loss, rewards/acc" in str(error.value)
    assert str(error.value).endswith(f"got {metric!r}")


def test_the_metrics_that_can_select_a_model_and_their_directions():
    directions = {metric.name: metric.better for metric in METRICS.values() if metric.better}
    assert directions == {
        "loss": "lower",
        "rewards/chosen": "higher",
        "rewards/rejected": "lower",
        "rewards/margins": "higher",
        "rewards/accuracies": "higher",
        "logps/chosen": "higher",
        "logps/rejected": "lower",
    }
