from dataclasses import asdict, make_dataclass

import mlx.core as mx
import pytest

from mlx_dpo.data.batches.metadata import pair_metadata
from mlx_dpo.losses import metrics
from mlx_dpo.losses.metrics import (
    METRICS,
    compute_metrics,
    concatenate_outputs,
    step_row,
    to_public_names,
)
from mlx_dpo.types import (
    LossOutputs,
    PairLogps,
    PreferenceMetrics,
    ScoredPairs,
    StepMetrics,
    TokenizedPair,
)

ZEROS = PairLogps(mx.zeros((2,)), mx.zeros((2,)))


def make_outputs(losses, policy, reference, *, beta, desirable=None):
    labels = desirable or [None] * len(losses)
    metadata = pair_metadata([TokenizedPair((1,), (2,), (3,), desirable=label) for label in labels])
    return LossOutputs(
        losses,
        ScoredPairs(policy, reference, metadata, mx.ones(losses.shape)),
        beta * (policy.chosen - reference.chosen),
        beta * (policy.rejected - reference.rejected),
    )


def make_pair_outputs(chosen, rejected, *, losses=(0.25, 0.75), reference=ZEROS, beta=0.5):
    policy = PairLogps(mx.array(chosen), mx.array(rejected))
    return make_outputs(mx.array(losses), policy, reference, beta=beta)


def test_accuracy_is_counted_pair_by_pair():
    """One pair right by a little, one wrong by a lot: half are right, though the mean is wrong."""
    result = compute_metrics(make_pair_outputs([-1.0, -9.0], [-2.0, -3.0]))
    assert result.accuracies == 0.5
    assert result.margins == pytest.approx(0.5 * (1.0 - 6.0) / 2)


def test_a_tie_counts_as_wrong():
    assert compute_metrics(make_pair_outputs([-1.0, -3.0], [-1.0, -4.0])).accuracies == 0.5


def test_rewards_are_beta_times_the_log_ratio_and_logps_are_the_policys_sums():
    reference = PairLogps(mx.array([-2.0, -2.0]), mx.array([-1.0, -5.0]))
    result = compute_metrics(make_pair_outputs([-1.0, -3.0], [-4.0, -6.0], reference=reference))
    assert result.chosen_rewards == pytest.approx(0.5 * (1 - 1) / 2)
    assert result.rejected_rewards == pytest.approx(0.5 * (-3 - 1) / 2)
    assert result.chosen_logps == -2.0
    assert result.rejected_logps == -5.0
    assert result.loss == 0.5


def test_micro_batches_are_weighted_by_their_number_of_pairs():
    """A mean of the parts' means would give 0.5."""
    small = make_outputs(
        mx.array([1.0]), PairLogps(mx.array([1.0]), mx.array([0.0])),
        PairLogps(mx.zeros((1,)), mx.zeros((1,))), beta=1.0,
    )  # fmt: skip
    large = make_outputs(
        mx.zeros((3,)), PairLogps(mx.zeros((3,)), mx.ones((3,))),
        PairLogps(mx.zeros((3,)), mx.zeros((3,))), beta=1.0,
    )  # fmt: skip
    result = compute_metrics(concatenate_outputs([small, large]))
    assert result.loss == 0.25
    assert result.accuracies == 0.25


def test_every_metric_has_an_entry_and_no_two_share_a_name():
    assert METRICS.keys() == set(PreferenceMetrics._fields)
    assert len({metric.name for metric in METRICS.values()}) == len(METRICS)


@pytest.mark.parametrize("labels", [None, [True, False, True]])
def test_metrics_are_filled_by_name_not_by_the_order_of_the_fields(monkeypatch, labels):
    """Fields in the reverse order have the same values under the same names."""
    policy = PairLogps(mx.array([-1.0, -9.0, -4.0]), mx.array([-2.0, -3.0, -8.0]))
    reference = PairLogps(mx.array([-2.0, -7.0, -4.5]), mx.array([-1.0, -3.5, -5.0]))
    losses = mx.array([0.25, 0.75, 1.0])
    outputs = make_outputs(losses, policy, reference, beta=0.5, desirable=labels)
    expected = compute_metrics(outputs, labelled=labels is not None)._asdict()
    fields = [(name, "float | None", None) for name in reversed(PreferenceMetrics._fields)]
    reordered = make_dataclass("Reordered", fields)
    monkeypatch.setattr(metrics, "PreferenceMetrics", reordered)
    assert asdict(compute_metrics(outputs, labelled=labels is not None)) == expected


def test_public_names_are_those_of_trl():
    result = compute_metrics(make_pair_outputs([-1.0, -9.0], [-2.0, -3.0]))
    step = StepMetrics(
        step=3,
        epoch=0.5,
        preferences=result,
        grad_norm=1.5,
        learning_rate=1e-5,
        num_tokens=99,
        padding_share=0.25,
    )
    assert set(step_row(step)) == {
        "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "padding_share",
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected",
        "rewards/margins_stderr",
    }  # fmt: skip
    assert step_row(step)["logps/rejected"] == result.rejected_logps
    assert to_public_names(result, prefix="eval_")["eval_rewards/accuracies"] == 0.5


def test_lengths_of_labelled_examples_are_means_by_label():
    """`rejected` holds the mismatched completions, whose lengths are not reported."""
    rows = [((2,) * 4, True), ((2,) * 2, True), ((2,) * 7, False)]
    metadata = pair_metadata([TokenizedPair((1,), t, (9,) * 5, desirable=good) for t, good in rows])
    zeros = mx.zeros((3,))
    scored = ScoredPairs(PairLogps(zeros, zeros), PairLogps(zeros, zeros), metadata, zeros)
    result = to_public_names(
        compute_metrics(LossOutputs(zeros, scored, zeros, zeros), labelled=True)
    )
    assert (result["lengths/chosen"], result["lengths/rejected"]) == (3.0, 7.0)


def labelled(desirable):
    """Return metrics of four labelled rows; the mismatched completions have a KL of 1 nat."""
    policy = PairLogps(mx.array([-1.0, -5.0, -3.0, -4.0]), mx.array([2.0, 0.0, 1.0, 1.0]))
    reference = PairLogps(mx.array([-4.0, -4.0, -4.0, -4.0]), mx.zeros((4,)))
    losses = mx.array([0.1, 0.2, 0.3, 0.4])
    return compute_metrics(
        make_outputs(losses, policy, reference, beta=0.5, desirable=desirable), labelled=True
    )


def test_metrics_of_labelled_rows_are_means_by_label():
    """Rewards are 1.5, -0.5, 0.5 and 0; the reference point is 0.5."""
    result = labelled([True, True, False, False])
    assert result.loss == pytest.approx(0.25)
    assert (result.chosen_rewards, result.rejected_rewards) == (0.5, 0.25)
    assert result.margins == 0.25
    assert (result.chosen_logps, result.rejected_logps) == (-3.0, -3.5)
    assert result.kl == 1.0
    # The first is above (correct), the second below; a reward on the point is never correct.
    assert result.accuracies == 0.5


def test_a_step_without_undesirable_rows_has_no_metrics_of_them():
    row = to_public_names(labelled([True] * 4))
    assert "rewards/rejected" not in row and "rewards/margins" not in row
    assert row["rewards/chosen"] == 0.375


def test_the_length_correlation_is_that_of_length_difference_and_margin():
    """By hand: length differences 2, 0, -2, margins 3, 1, 2: 2 / sqrt(8 * 2)."""
    lengths = [(3, 1), (2, 2), (1, 3)]
    metadata = pair_metadata([TokenizedPair((1,), (2,) * c, (3,) * r) for c, r in lengths])
    chosen, zeros = mx.array([3.0, 1.0, 2.0]), mx.zeros((3,))
    scored = ScoredPairs(PairLogps(chosen, zeros), PairLogps(zeros, zeros), metadata, zeros)
    result = compute_metrics(LossOutputs(zeros, scored, chosen, zeros))
    assert result.length_correlation == pytest.approx(2 / 16**0.5)
    assert (result.chosen_tokens, result.rejected_tokens) == (2.0, 2.0)
    same = scored._replace(metadata=pair_metadata([TokenizedPair((1,), (2,), (3, 3, 3))] * 3))
    result = compute_metrics(LossOutputs(zeros, same, chosen, zeros))
    assert (result.chosen_tokens, result.rejected_tokens) == (1.0, 3.0)
    assert result.length_correlation is None


def test_the_standard_error_of_the_margin_is_that_of_its_mean():
    """Margins 0.5 and -3 at beta 0.5: standard deviation 3.5 / sqrt 2, of two pairs 3.5 / 2."""
    result = compute_metrics(make_pair_outputs([-1.0, -9.0], [-2.0, -3.0]))
    assert result.margins_stderr == pytest.approx(1.75)
    one = PairLogps(mx.zeros((1,)), mx.zeros((1,)))
    assert (
        compute_metrics(
            make_pair_outputs([-1.0], [-2.0], losses=(0.5,), reference=one)
        ).margins_stderr
        is None
    )
