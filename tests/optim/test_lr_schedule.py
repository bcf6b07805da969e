import pytest

from mlx_dpo.optim.lr_schedule import LR_SCHEDULES, learning_rate

# Peak 0.3; rates of transformers.get_scheduler (5.23) with SGD, read before each step.
TRANSFORMERS = [
    ("cosine", 2, 0.0,
     [0.0, 0.15, 0.3, 0.27135254915624213, 0.19635254915624212, 0.1036474508437579,
      0.0286474508437579]),
    ("cosine_with_min_lr", 2, 0.2,
     [0.0, 0.15, 0.3, 0.2770820393249937, 0.21708203932499368, 0.1429179606750063,
      0.08291796067500631]),
    ("linear", 3, 0.0, [0.0, 0.09999999999999999, 0.19999999999999998, 0.3, 0.225, 0.15, 0.075]),
    ("inverse_sqrt", 2, 0.0,
     [0.0, 0.15, 0.3, 0.24494897427831783, 0.21213203435596423, 0.18973665961010275,
      0.17320508075688776]),
    ("inverse_sqrt", 0, 0.0, [0.3, 0.2999850011249063, 0.29997000449925015, 0.29995501012246945]),
    ("constant_with_warmup", 2, 0.0, [0.0, 0.15, 0.3, 0.3, 0.3]),
    ("constant", 0, 0.0, [0.3, 0.3, 0.3]),
]  # fmt: skip


def rates(total, **more):
    return [learning_rate(s, peak=0.3, total=total, **more) for s in range(total)]


@pytest.mark.parametrize(("schedule", "warmup", "min_lr_rate", "expected"), TRANSFORMERS)
def test_rates_are_those_of_transformers(schedule, warmup, min_lr_rate, expected):
    actual = rates(len(expected), warmup=warmup, schedule=schedule, min_lr_rate=min_lr_rate)
    assert actual == pytest.approx(expected, abs=1e-12)


def test_every_schedule_is_compared_with_transformers():
    assert {schedule for schedule, *_ in TRANSFORMERS} == set(LR_SCHEDULES)


def test_a_cosine_with_a_minimum_of_zero_is_a_cosine():
    plain = rates(9, warmup=3, schedule="cosine")
    assert rates(9, warmup=3, schedule="cosine_with_min_lr", min_lr_rate=0.0) == plain


def test_a_warm_up_as_long_as_the_run_never_ends():
    assert rates(3, warmup=3) == pytest.approx([0.0, 0.1, 0.2])
