import mlx.core as mx
import pytest

from mlx_dpo.data.batching import pair_metadata
from mlx_dpo.losses.metrics import concatenate, named, step_row, summarise
from mlx_dpo.types import LossOutputs, PairLogps, ScoredPairs, StepMetrics, TokenizedPair

ZEROS = PairLogps(mx.zeros((2,)), mx.zeros((2,)))


def outcomes(losses, policy, reference, *, beta, desirable=None):
    labels = desirable or [None] * len(losses)
    facts = pair_metadata([TokenizedPair((1,), (2,), (3,), desirable=label) for label in labels])
    return LossOutputs(
        losses,
        ScoredPairs(policy, reference, facts, mx.ones(losses.shape)),
        beta * (policy.chosen - reference.chosen),
        beta * (policy.rejected - reference.rejected),
    )


def outcome(chosen, rejected, *, losses=(0.25, 0.75), reference=ZEROS, beta=0.5):
    policy = PairLogps(mx.array(chosen), mx.array(rejected))
    return outcomes(mx.array(losses), policy, reference, beta=beta)


def test_accuracy_is_counted_pair_by_pair():
    """One pair right by a little, one wrong by a lot: half are right, though the mean is wrong."""
    metrics = summarise(outcome([-1.0, -9.0], [-2.0, -3.0]))
    assert metrics.accuracies == 0.5
    assert metrics.margins == pytest.approx(0.5 * (1.0 - 6.0) / 2)


def test_a_tie_counts_as_wrong():
    assert summarise(outcome([-1.0, -3.0], [-1.0, -4.0])).accuracies == 0.5


def test_rewards_are_beta_times_the_log_ratio_and_logps_are_the_policys_sums():
    reference = PairLogps(mx.array([-2.0, -2.0]), mx.array([-1.0, -5.0]))
    metrics = summarise(outcome([-1.0, -3.0], [-4.0, -6.0], reference=reference))
    assert metrics.chosen_rewards == pytest.approx(0.5 * (1 - 1) / 2)
    assert metrics.rejected_rewards == pytest.approx(0.5 * (-3 - 1) / 2)
    assert metrics.chosen_logps == -2.0
    assert metrics.rejected_logps == -5.0
    assert metrics.loss == 0.5


def test_parts_of_unequal_size_weigh_by_their_pairs():
    """A mean of the parts' means would give 0.5."""
    small = outcomes(
        mx.array([1.0]), PairLogps(mx.array([1.0]), mx.array([0.0])),
        PairLogps(mx.zeros((1,)), mx.zeros((1,))), beta=1.0,
    )  # fmt: skip
    large = outcomes(
        mx.zeros((3,)), PairLogps(mx.zeros((3,)), mx.ones((3,))),
        PairLogps(mx.zeros((3,)), mx.zeros((3,))), beta=1.0,
    )  # fmt: skip
    metrics = summarise(concatenate([small, large]))
    assert metrics.loss == 0.25
    assert metrics.accuracies == 0.25


def test_public_names_are_those_of_trl():
    metrics = summarise(outcome([-1.0, -9.0], [-2.0, -3.0]))
    step = StepMetrics(
        step=3,
        epoch=0.5,
        preferences=metrics,
        grad_norm=1.5,
        learning_rate=1e-5,
        num_tokens=99,
        padding_share=0.25,
    )
    assert set(step_row(step)) == {
        "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "padding_share",
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected",
    }  # fmt: skip
    assert step_row(step)["logps/rejected"] == metrics.rejected_logps
    assert named(metrics, prefix="eval_")["eval_rewards/accuracies"] == 0.5


def test_lengths_of_labelled_rows_are_those_of_each_kind():
    """The second of `chosen` and `rejected` is what the row was mismatched with: not meant."""
    rows = [((2,) * 4, True), ((2,) * 2, True), ((2,) * 7, False)]
    facts = pair_metadata([TokenizedPair((1,), t, (9,) * 5, desirable=good) for t, good in rows])
    nothing = mx.zeros((3,))
    scored = ScoredPairs(PairLogps(nothing, nothing), PairLogps(nothing, nothing), facts, nothing)
    found = named(summarise(LossOutputs(nothing, scored, nothing, nothing), labelled=True))
    assert (found["lengths/chosen"], found["lengths/rejected"]) == (3.0, 7.0)


def labelled(desirable):
    """Four judged rows; beta 0.5, the mismatched completions have moved by 1 nat on average."""
    policy = PairLogps(mx.array([-1.0, -5.0, -3.0, -4.0]), mx.array([2.0, 0.0, 1.0, 1.0]))
    reference = PairLogps(mx.array([-4.0, -4.0, -4.0, -4.0]), mx.zeros((4,)))
    losses = mx.array([0.1, 0.2, 0.3, 0.4])
    return summarise(
        outcomes(losses, policy, reference, beta=0.5, desirable=desirable), labelled=True
    )


def test_labelled_rows_have_means_by_label_and_are_right_on_their_side_of_the_reference_point():
    """Rewards 1.5, -0.5, 0.5, 0; the point is at 0.5."""
    metrics = labelled([True, True, False, False])
    assert metrics.loss == pytest.approx(0.25)
    assert (metrics.chosen_rewards, metrics.rejected_rewards) == (0.5, 0.25)
    assert metrics.margins == 0.25
    assert (metrics.chosen_logps, metrics.rejected_logps) == (-3.0, -3.5)
    assert metrics.kl == 1.0
    # The first lies above, the second below; a reward on the point is on nobody's side.
    assert metrics.accuracies == 0.5


def test_a_step_without_rows_of_one_kind_says_nothing_of_them():
    row = named(labelled([True] * 4))
    assert "rewards/rejected" not in row and "rewards/margins" not in row
    assert row["rewards/chosen"] == 0.375


def test_the_margin_is_correlated_with_how_much_longer_chosen_is():
    """By hand: length differences 2, 0, -2, margins 3, 1, 2: 2 / sqrt(8 * 2)."""
    lengths = [(3, 1), (2, 2), (1, 3)]
    facts = pair_metadata([TokenizedPair((1,), (2,) * c, (3,) * r) for c, r in lengths])
    chosen, zeros = mx.array([3.0, 1.0, 2.0]), mx.zeros((3,))
    scored = ScoredPairs(PairLogps(chosen, zeros), PairLogps(zeros, zeros), facts, zeros)
    found = summarise(LossOutputs(zeros, scored, chosen, zeros))
    assert found.length_correlation == pytest.approx(2 / 16**0.5)
    assert (found.chosen_tokens, found.rejected_tokens) == (2.0, 2.0)
    same = scored._replace(metadata=pair_metadata([TokenizedPair((1,), (2,), (3, 3, 3))] * 3))
    found = summarise(LossOutputs(zeros, same, chosen, zeros))
    assert (found.chosen_tokens, found.rejected_tokens) == (1.0, 3.0)
    assert found.length_correlation is None
