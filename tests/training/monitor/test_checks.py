"""The monitor on made-up series: each fault by hand, its opposite, and its numbers."""

from dataclasses import replace

import pytest

from mlx_dpo.training.monitor import Monitor
from mlx_dpo.training.monitor.checks import CHECKS
from mlx_dpo.training.monitor.metrics import MonitoredRun

RUN = MonitoredRun(
    total_steps=200,
    warmup_steps=20,
    batch_size=16,
    beta=0.1,
    learning_rate=5e-6,
    max_grad_norm=1.0,
    chosen_tokens=20.0,
)
WINDOW = 20  # steps: a tenth of the run


def healthy(step):
    """A run as it should be: margins grow by what rejected loses and chosen wins."""
    gone = step / RUN.total_steps
    noise = 0.05 * (-1) ** step
    chosen, rejected = 0.4 * gone + noise / 10, -1.2 * gone - noise / 10
    return {
        "step": step,
        "loss": 0.693 - 0.5 * gone + noise / 4,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": min(1.0, 0.55 + 0.4 * gone + noise),
        "length_correlation": 0.2 + 4 * noise,
        "grad_norm": 1.1 + 10 * noise,
    }


def monitor_warnings(run=RUN, *, until=None, **faults):
    """Return the warnings of a run in which each fault replaces a healthy value by step."""
    monitor, warnings = Monitor(run), []
    for step in range(1, (until or run.total_steps) + 1):
        row = healthy(step)
        for name, fault in faults.items():
            row[name] = fault(step) if callable(fault) else fault
        warnings += monitor.update(row)
        assert monitor.update({"step": step, "eval_loss": 9.0, "eval_rewards/chosen": -99.0}) == []
    return warnings


def at(**named):
    """Names as in a row, which have slashes."""
    return {name.replace("_", "/", 1) if name.startswith("rewards_") else name: fault
            for name, fault in named.items()}  # fmt: skip


def test_a_healthy_run_hears_nothing():
    assert monitor_warnings() == []


def test_a_policy_that_does_not_move_gets_advice_for_a_larger_learning_rate():
    flat = at(rewards_margins=4e-4, loss=0.6931)
    assert monitor_warnings(until=39, **flat) == []
    [sentence] = monitor_warnings(**flat)
    assert sentence == (
        "steps 31 to 40: the loss stays at 0.6931, where it began (margins of 0.0004 on average): "
        "the policy has hardly moved; use a larger learning_rate than 5e-06"
    )
    assert (
        monitor_warnings(**at(rewards_margins=lambda s: 0.02 * (-1) ** s)) == []
    )  # it moves, to and fro


def test_in_a_short_run_the_warning_comes_at_the_end():
    short = replace(RUN, total_steps=15, warmup_steps=2)
    [sentence] = monitor_warnings(short, **at(rewards_margins=1e-4))
    assert sentence.startswith("steps 6 to 15: ")
    shortest = replace(RUN, total_steps=3, warmup_steps=1)
    [sentence] = monitor_warnings(shortest, **at(rewards_margins=1e-4))
    assert sentence.startswith("step 3: ")
    assert sentence.endswith("a larger learning_rate than 5e-06, or more epochs")
    # Steps of the warm-up do not count: the margins after it are 0.12 nats per pair.
    moved = at(rewards_margins=lambda s: 0.0 if s <= 2 else 0.012)
    assert monitor_warnings(replace(RUN, total_steps=4, warmup_steps=1), **moved) == []
    # Margins of the first step are zero in any run.
    assert monitor_warnings(replace(RUN, total_steps=2), **at(rewards_margins=0.0)) == []


def test_perfect_accuracy_gives_a_warning_only_early_in_the_run():
    [sentence] = monitor_warnings(**at(rewards_accuracies=lambda s: 0.0 if s <= 2 else 1.0))
    assert sentence.startswith("steps 3 to 7: accuracy is already 100.0% after 4% of")
    assert monitor_warnings(**at(rewards_accuracies=lambda s: 1.0 if s > 8 else 0.5)) == []


def test_a_few_pairs_are_no_accuracy():
    """Ten steps are soon; at 4 pairs a step they have judged 40 pairs."""
    assert monitor_warnings(replace(RUN, batch_size=4), **at(rewards_accuracies=1.0)) == []


def test_likelihood_displacement_gives_a_warning_with_remedies():
    """Chosen loses 0.02 nats a step, rejected 0.06: beta 0.1 makes a tenth of it of rewards."""
    falling = at(
        rewards_chosen=lambda s: -0.002 * s,
        rewards_rejected=lambda s: -0.006 * s,
        rewards_margins=lambda s: 0.004 * s,
    )
    [sentence] = monitor_warnings(**falling)
    # The mean over the window is first a nat lost when its middle is step 50.
    assert sentence == (
        "steps 41 to 60: chosen completions lose likelihood while the margin grows (log-ratio "
        "-1.0 nats, -0.6 before; margin 0.20, 0.12 before); add `sft` to the losses, use "
        "loss_type `dpop`, "
        "a larger beta than 0.1, or a smaller learning_rate than 5e-06"
    )


@pytest.mark.parametrize(
    "other",
    [
        {"rewards/chosen": lambda s: -0.0004 * s},  # 0.8 nats by the end: little
        {"rewards/chosen": lambda s: -0.4 + 0.001 * s},  # far below, and rising
        {"rewards/margins": lambda s: 0.8 - 0.001 * s},  # no margin gained by it
    ],
)
def test_other_changes_of_likelihood_give_no_displacement_warning(other):
    falling = {"rewards/chosen": lambda s: -0.002 * s, "rewards/margins": lambda s: 0.004 * s}
    assert len(monitor_warnings(**falling)) == 1
    assert monitor_warnings(**(falling | other)) == []


def test_a_long_completion_may_lose_a_little_in_each_token():
    falling = {"rewards/chosen": lambda s: -0.002 * s, "rewards/margins": lambda s: 0.004 * s}
    assert monitor_warnings(replace(RUN, chosen_tokens=400.0), **falling) == []


BOTH_GAIN = {"rewards/chosen": 0.4, "rewards/rejected": 0.1, "rewards/margins": 0.3}
BOTH_LOSE = {"rewards/chosen": -0.5, "rewards/rejected": -1.5, "rewards/margins": 1.0}


@pytest.mark.parametrize(
    ("correlation", "share", "lean"), [(0.62, 0.8, "longer"), (-0.8, 0.25, "shorter")]
)
def test_pairs_that_teach_a_length_are_to_be_balanced(correlation, share, lean):
    """Chosen is longer, or shorter, in most pairs, and the margin follows."""
    run = replace(RUN, chosen_longer=share)
    [sentence] = monitor_warnings(run, length_correlation=lambda s: correlation + 0.1 * (-1) ** s)
    assert f"(correlation {correlation:+.2f} with how much longer chosen is)" in sentence
    assert sentence.endswith(
        f"so that the policy can learn to be {lean}; balance the lengths of the pairs, or use a "
        "loss that divides by lengths (`sigmoid_norm`, `simpo`) or `ld_alpha`"
    )


def test_likelihood_lost_in_each_token_is_not_called_a_preference_for_length():
    """Both lose by the token, lengths are balanced: the case of hh-harmless at a large rate."""
    run = replace(RUN, chosen_longer=0.504, rejected_tokens=30.0)
    [sentence] = monitor_warnings(run, length_correlation=-0.89, **BOTH_LOSE)
    # Rewards of -0.5 and -1.5 are -5 and -15 nats at beta 0.1: -0.25 and -0.5 in each token.
    assert sentence == (
        "steps 1 to 20: the margin follows the lengths of the completions (correlation -0.89 with "
        "how much longer chosen is): chosen and rejected both lose likelihood per token (chosen "
        "-0.25 nats, rejected -0.50), so long ones lose more; likelihood displacement, not by "
        "itself a preference for shorter answers; chosen is longer in 50.4% of the pairs, so "
        "length alone does not separate chosen from rejected; add `sft` to the losses "
        "(`loss_weights`), or use loss_type `dpop`, or use a larger beta than 0.1, or use a "
        "smaller learning_rate than 5e-06"
    )


def test_likelihood_gained_in_each_token_gets_no_advice_to_mix_in_sft():
    [sentence] = monitor_warnings(length_correlation=0.7, **BOTH_GAIN)
    assert "chosen and rejected both gain likelihood per token" in sentence
    assert "sft" not in sentence
    assert "balance" not in sentence


def test_both_causes_are_named_where_both_are_seen():
    run = replace(RUN, chosen_longer=0.1)
    [sentence] = monitor_warnings(run, length_correlation=-0.89, **BOTH_LOSE)
    assert "likelihood displacement" in sentence
    assert "balance the lengths of the pairs" in sentence


@pytest.mark.parametrize("run", [RUN, replace(RUN, referenced=False, chosen_longer=0.5)])
def test_balanced_pairs_get_no_advice_to_balance_them(run):
    [sentence] = monitor_warnings(
        run, length_correlation=0.9, **{"rewards/chosen": -1.0, "rewards/rejected": -3.0}
    )
    assert "balance" not in sentence
    assert sentence.endswith(
        "length alone does not separate chosen from rejected; use a loss that divides by lengths "
        "(`sigmoid_norm`, `simpo`) or `ld_alpha`"
    )


FALLEN = {
    "loss": lambda s: 0.6931 if s < 3 else 4.0,
    "rewards/accuracies": lambda s: 0.5 if s < 3 else 0.0,
    "rewards/margins": lambda s: 0.0 if s < 3 else -3.9,
    "rewards/chosen": lambda s: 0.0 if s < 3 else -10.0,
    "length_correlation": -0.9,
    "grad_norm": 50.0,
}


def test_a_run_that_falls_apart_is_told_at_once_and_once():
    """Nothing else applies after that: not lengths, not clipping, not the distance."""
    assert monitor_warnings(until=3, **FALLEN) == []
    [sentence] = monitor_warnings(**FALLEN)
    assert sentence == (
        "steps 3 to 4: the run has diverged (loss 4.00, 0.69 at step 1; accuracy 0%, chosen "
        "completions 5.0 nats per token less likely than before): stop it and use a smaller "
        "learning_rate than 5e-06"
    )


@pytest.mark.parametrize(
    "faults",
    [
        # A loss that is bounded, as KTO's, shows it by the margin alone.
        {"loss": 0.9, "rewards/accuracies": 0.1, "rewards/margins": -1.5},
        # The margin may have the right sign while nothing likely is left.
        {"rewards/chosen": -7.0, "rewards/rejected": -9.0, "rewards/margins": 2.0},
    ],
)
def test_other_ways_to_fall_apart(faults):
    late = {
        name: lambda s, name=name, value=value: value if s > 5 else healthy(s)[name]
        for name, value in faults.items()
    }
    sentence = monitor_warnings(**late)[0]
    assert sentence.startswith("steps 6 to 7: the run has diverged (loss ")


@pytest.mark.parametrize(
    "sound",
    [
        # A hard batch now and then, of few pairs.
        {"loss": lambda s: 2.5 if s % 4 == 0 else 0.5, "rewards/margins": lambda s: -2.0
         if s % 4 == 0 else 0.5, "rewards/accuracies": lambda s: 0.0 if s % 4 == 0 else 0.8},
        # IPO's loss begins at 25.
        {"loss": lambda s: 25.0 + s % 7},
        # Pairs with weights: the loss of a batch is what they make it.
        {"loss": lambda s: 0.1 if s == 1 else 5.0},
        {"rewards/chosen": -1.9, "rewards/rejected": -9.0, "rewards/margins": 7.1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch_size", [2, 16])
def test_sound_runs_are_not_said_to_fall_apart(sound, batch_size):
    found = monitor_warnings(replace(RUN, batch_size=batch_size), **sound)
    assert not [sentence for sentence in found if "diverged" in sentence]


def test_correlations_of_next_to_nothing_are_noise():
    flat = at(rewards_margins=0.05)
    assert monitor_warnings(length_correlation=0.9, **flat) == []
    assert monitor_warnings(length_correlation=lambda s: 0.9 * (-1) ** s) == []


def test_gradients_that_are_always_clipped_are_counted_after_the_warm_up():
    norms = {"grad_norm": lambda s: 0.5 if s % 20 == 0 else 8.0 + s % 2}
    assert monitor_warnings(until=39, **norms) == []
    [sentence] = monitor_warnings(**norms)
    assert sentence == (
        "steps 21 to 40: the gradient was clipped in 19 of 20 steps (median norm 8.5, "
        "max_grad_norm 1): clipping makes all batches count equally; raise max_grad_norm"
    )
    assert monitor_warnings(replace(RUN, max_grad_norm=0.0), **norms) == []
    assert (
        monitor_warnings(replace(RUN, max_grad_norm=3.0), **norms) == []
    )  # by less than three times
    assert (
        monitor_warnings(grad_norm=lambda s: 0.5 if s % 10 == 0 else 8.0) == []
    )  # one in ten is not


@pytest.mark.parametrize(("reward", "how"), [(3.0, "more"), (-3.0, "less")])
def test_a_policy_that_runs_away_is_measured_in_nats_a_token(reward, how):
    """A reward of 3 is 30 nats at beta 0.1, 1.5 a token at 20 tokens."""
    away = at(rewards_chosen=reward, rewards_margins=8.0)
    [sentence] = monitor_warnings(**away)
    assert sentence.startswith("steps 1 to 20: the policy is far from the reference (chosen ")
    assert f"completions are 1.5 nats per token {how} likely)" in sentence
    assert monitor_warnings(replace(RUN, chosen_tokens=31.0), **away) == []
    assert monitor_warnings(replace(RUN, beta=0.16), **away) == []


def test_rejected_completions_may_become_as_unlikely_as_they_will():
    assert monitor_warnings(**at(rewards_rejected=-90.0, rewards_margins=90.0)) == []


def test_without_a_reference_rewards_say_nothing_of_distance():
    run = replace(RUN, referenced=False)
    assert (
        monitor_warnings(
            run, **at(rewards_chosen=-30.0, rewards_rejected=-50.0, rewards_margins=0.0)
        )
        == []
    )


def test_rows_that_lack_a_mean_are_passed_over():
    """A step of labelled rows may have none of one kind."""
    monitor = Monitor(RUN)
    for step in range(1, 201):
        row = {"step": step, "loss": 0.5, "rewards/accuracies": 0.6, "grad_norm": 0.5}
        assert monitor.update(row if step % 2 else healthy(step)) == []


def test_each_warning_is_given_once_even_after_a_resume():
    faults = {"grad_norm": 8.0, "length_correlation": 0.9}
    rows = [healthy(step) | faults for step in range(1, 201)]
    straight = Monitor(RUN)
    said = [sentence for row in rows for sentence in straight.update(row)]
    assert len(said) == 2
    for cut in (5, 19, 20, 150):
        again = Monitor(RUN)
        before = [sentence for row in rows[:cut] for sentence in again.update(row)]
        after = [sentence for row in rows[cut:] for sentence in again.update(row)]
        assert before + after == said


def test_every_check_has_a_test():
    assert len(CHECKS) == 7
