"""The verdict on a policy, from metrics by hand: what is noise, what is worse, what is sound."""

from dataclasses import replace

import pytest

from mlx_dpo.training.monitor import Monitor
from mlx_dpo.training.monitor.metrics import MonitoredRun
from mlx_dpo.training.monitor.verdict import (
    FAR,
    UNCHANGED,
    UNCLEAR,
    WORSE,
    Verdict,
    describe_result,
    judge_policy,
)

RUN = MonitoredRun(
    total_steps=60, warmup_steps=6, batch_size=16, beta=0.1, learning_rate=5e-6,
    max_grad_norm=1.0, chosen_tokens=10.0,
)  # fmt: skip


def metrics(margin, chosen=0.0, accuracy=0.9, stderr=0.0):
    return {
        "loss": 0.6,
        "rewards/margins": margin,
        "rewards/chosen": chosen,
        "rewards/rejected": chosen - margin,
        "rewards/accuracies": accuracy,
        "rewards/margins_stderr": stderr,
        "lengths/chosen": 10.0,
    }


def kind(run, values):
    verdict = judge_policy(run, values)
    return verdict and verdict.kind


def test_a_margin_of_next_to_nothing_is_noise_whatever_the_accuracy():
    """The first run of the README: 96 % accuracy at a margin of 0.0003, 0.003 nats per pair."""
    verdict = judge_policy(RUN, metrics(0.0003, accuracy=0.96))
    assert (verdict.kind, verdict.is_noise, verdict.is_worse) == (UNCHANGED, True, False)
    assert verdict.text == (
        "the policy has hardly changed: the log-ratio margin is +0.003 nats per pair, so accuracy "
        "is noise; use more pairs or more `epochs` (this run took 60 steps), or a larger "
        "learning_rate than 5e-06, such as 5e-05"
    )
    assert "log-ratio margin is -0.003 nats" in judge_policy(RUN, metrics(-0.0003)).text
    longer = judge_policy(replace(RUN, total_steps=3000), metrics(0.0003))
    assert longer.text.endswith("such as 5e-05")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (metrics(0.011), None),  # 0.11 nats per pair
        (metrics(0.0099), UNCHANGED),
        (metrics(-0.0099, accuracy=0.1), UNCHANGED),
        (metrics(0.009, chosen=-0.3), UNCLEAR),  # it moved by 3 nats, but learned no preference
        (metrics(0.3, stderr=0.16), UNCLEAR),
        (metrics(0.3, stderr=0.14), None),
        (metrics(-0.3, accuracy=0.2, stderr=0.1), WORSE),
        (metrics(-0.3, accuracy=0.2, stderr=0.2), UNCLEAR),
        (metrics(-0.3, accuracy=0.6, stderr=0.1), None),  # a few pairs pull the mean down
        (metrics(5.0, chosen=0.3), None),
        (metrics(5.0, chosen=-0.9), None),  # 0.9 nats per token less likely: displaced, not broken
        (metrics(5.0, chosen=-1.1, accuracy=0.9), FAR),
    ],
)  # fmt: skip
def test_verdicts(values, expected):
    assert kind(RUN, values) == expected


def test_nats_count_not_rewards():
    """At beta 1 a margin of 0.05 is less than a tenth of a nat, at beta 0.01 it is five."""
    assert kind(replace(RUN, beta=1.0), metrics(0.05)) == UNCHANGED
    assert kind(replace(RUN, beta=0.01), metrics(0.05)) is None


def test_a_policy_that_is_worse_says_what_to_do():
    far = judge_policy(RUN, metrics(-4.0, chosen=-10.0, accuracy=0.0))
    assert far.is_worse
    assert far.text.startswith("the policy is worse than the base model: chosen completions are ")
    assert "10.0 nats per token less likely than before training (accuracy 0.0%)" in far.text
    swapped = judge_policy(RUN, metrics(-4.0, accuracy=0.0))
    assert "it prefers the rejected completions (accuracy 0.0%, margin -4.00)" in swapped.text
    assert "smaller learning_rate than 5e-06" in swapped.text


def test_rewards_that_are_no_log_ratios_give_no_verdict():
    for run in (replace(RUN, referenced=False), replace(RUN, from_start=False)):
        assert kind(run, metrics(0.0)) is kind(run, metrics(-9.0, accuracy=0.0)) is None


def test_rows_of_labelled_data_may_lack_a_margin():
    assert kind(RUN, {"loss": 0.5, "rewards/accuracies": 0.5, "rewards/chosen": 0.0}) is None


def test_without_held_out_pairs_the_last_steps_count():
    monitor = Monitor(RUN)
    for step in range(1, 61):
        monitor.update({"step": step, "grad_norm": 1.0} | metrics(0.0 if step < 40 else 0.5, 0.2))
    assert monitor.judge(None) is None
    assert monitor.judge({"eval_" + n: value for n, value in metrics(0.0).items()}).kind == (
        UNCHANGED
    )


def test_a_verdict_is_read_back_from_a_record():
    verdict = judge_policy(RUN, metrics(0.0))
    assert Verdict.from_record({"verdict": verdict.to_dict()}) == verdict
    assert Verdict.from_record({"verdict": None}) is Verdict.from_record({}) is None


def test_the_result_says_whether_chosen_is_preferred_and_never_hides_a_fault():
    better = {"eval_loss": 0.5, "eval_rewards/margins": 0.54, "eval_rewards/accuracies": 0.96}
    assert describe_result(None, better, "200 held-out pairs") == (
        "the policy prefers the chosen completions: 96.0% of 200 held-out pairs are ranked "
        "correctly, with a margin of +0.54"
    )
    for worse in ({"eval_rewards/margins": -0.1}, {"eval_rewards/accuracies": 0.4}):
        assert "does not prefer" in describe_result(None, better | worse, "2 held-out pairs")
    assert describe_result(None, {"eval_loss": 0.5}, "1 held-out answer") == (
        "the loss on 1 held-out answer is 0.5000"
    )
    assert "nothing was measured" in describe_result(None, None, "0 held-out pairs")
    fault = Verdict("worse", "the policy is worse")
    assert describe_result(fault, better, "2 held-out pairs") == "the policy is worse"


def test_a_preference_before_training_is_named():
    after = {"eval_loss": 0.4, "eval_rewards/margins": 0.08, "eval_rewards/accuracies": 1.0}
    before = {"eval_rewards/margins": 0.07, "eval_rewards/accuracies": 0.9}
    assert describe_result(None, after, "8 held-out pairs", before).endswith(
        "with a margin of +0.08; before training 90.0%, with a margin of +0.07"
    )
    nothing = {"eval_rewards/margins": 0.0, "eval_rewards/accuracies": 0.0}
    assert describe_result(None, after, "8 held-out pairs", nothing).endswith("of +0.08")


def test_a_single_held_out_pair_shows_nothing():
    values = metrics(0.5)
    del values["rewards/margins_stderr"]
    evaluation = {"eval_" + name: value for name, value in values.items()}
    found = Monitor(RUN).judge(evaluation)
    assert (found.kind, found.is_noise) == (UNCLEAR, True)
    assert judge_policy(RUN, values) is None  # means over steps of one pair each
    free = replace(RUN, referenced=False)
    assert judge_policy(free, values, is_single_pair=True).kind == UNCLEAR
    assert judge_policy(RUN, {"loss": 0.5}, is_single_pair=True) is None
