import math

import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.losses.metrics import METRICS
from mlx_dpo.runs.early_stopping import BestState, EarlyStopping


def rule(metric="loss", patience=None, threshold=None):
    return EarlyStopping.for_metric(metric, patience=patience, threshold=threshold)


def evaluations(*values, name="eval_loss"):
    """Return an evaluation every ten steps, between rows of training steps."""
    rows = []
    for number, value in enumerate(values, start=1):
        rows += [{"step": 10 * number, "loss": 0.0}, {"step": 10 * number, name: value}]
    return rows


def state_after(*values, **more):
    stopping = rule(**more)
    return stopping.state_after(evaluations(*values, name=stopping.metric))


def test_the_lowest_loss_or_the_highest_of_other_metrics_is_best():
    assert state_after(3.0, 1.0, 2.0) == BestState(20, 1.0, num_without_improvement=1)
    assert state_after(0.5, 0.25, 0.75, metric="rewards/accuracies") == BestState(30, 0.75)
    assert state_after(-1.0, -2.0, metric="eval_rewards/rejected") == BestState(20, -2.0)


def test_a_tie_is_no_improvement():
    assert state_after(1.0, 1.0, 1.0) == BestState(10, 1.0, num_without_improvement=2)


def test_patience_counts_evaluations_in_a_row():
    stopping = rule(patience=2)
    assert not stopping.should_stop(stopping.state_after(evaluations(1.0, 2.0)))
    assert stopping.should_stop(stopping.state_after(evaluations(1.0, 2.0, 2.0)))
    assert not stopping.should_stop(stopping.state_after(evaluations(1.0, 2.0, 0.5, 2.0)))
    assert not rule().should_stop(BestState(10, 1.0, num_without_improvement=99))


def test_a_gain_within_the_threshold_is_best_but_does_not_reset_patience():
    """As in transformers, where the best checkpoint ignores the threshold."""
    assert state_after(1.0, 0.75, 0.5, threshold=0.25, patience=9) == BestState(
        30, 0.5, num_without_improvement=2
    )
    assert state_after(1.0, 0.5, threshold=0.25, patience=9) == BestState(
        20, 0.5, num_without_improvement=0
    )


def test_nan_is_never_the_best():
    assert state_after(math.nan) == state_after() == BestState()
    assert state_after(math.nan, 1.0, math.nan) == BestState(20, 1.0, num_without_improvement=1)


def test_a_resumed_run_has_the_state_of_an_uninterrupted_one():
    stopping, rows = rule(patience=3), evaluations(3.0, 1.0, 2.0, 0.5, 0.6, 0.7)
    for cut in range(len(rows)):
        state = stopping.state_after(rows[:cut])
        for row in rows[cut:]:
            state = stopping.update(state, row)
        assert state == stopping.state_after(rows)


@pytest.mark.parametrize("metric", ["accuracy", "eval_eval_loss", "kl", ""])
def test_a_metric_without_a_direction_is_refused_and_the_message_lists_the_others(metric):
    with pytest.raises(ConfigError) as error:
        rule(metric)
    assert (
        "must be one of logps/chosen, logps/rejected, loss, mean_token_accuracy, rewards/acc"
        in str(error.value)
    )
    assert str(error.value).endswith(f"got {metric!r}")


def test_the_metrics_that_can_select_a_model_and_their_directions():
    directions = {metric.name: metric.better for metric in METRICS.values() if metric.better}
    assert directions == {
        "loss": "lower",
        "mean_token_accuracy": "higher",
        "rewards/chosen": "higher",
        "rewards/rejected": "lower",
        "rewards/margins": "higher",
        "rewards/margins_best_worst": "higher",
        "rewards/accuracies": "higher",
        "logps/chosen": "higher",
        "logps/rejected": "lower",
    }
