"""The default learning rate against values that a reader can redo on paper."""

import pytest

from mlx_dpo.optim.default_learning_rate import (
    RateFactors,
    choose_learning_rate,
    choose_supervised_rate,
)

ZEPHYR = RateFactors(width=4096, alpha=32.0, steps=478, tokens=256)


@pytest.mark.parametrize(
    ("changed", "rate"),
    [
        ({}, 2e-5),  # the point that the rule goes through
        ({"steps": 4 * 478}, 1e-5),
        ({"width": 1024}, 4e-5),
        ({"width": None}, 2e-5),
        ({"tokens": 64}, 4e-5),
        ({"alpha": 128.0}, 5e-6),  # the published rate, with the published alpha
        ({"alpha": None}, 2e-6),  # full fine-tuning
        ({"steps": 10}, 1.4e-4),
        ({"steps": 1}, 1.4e-4),  # no more than in 10 steps
        ({"tokens": 8}, 1.1e-4),
        ({"tokens": 2}, 1.1e-4),  # no more than with 8 tokens
        ({"width": 576, "steps": 60, "tokens": 200}, 1.7e-4),
    ],
)
def test_the_rate_follows_width_alpha_steps_and_tokens(changed, rate):
    assert choose_learning_rate(ZEPHYR._replace(**changed)) == rate


def test_an_optimizer_with_a_factor_changes_the_rate():
    assert choose_learning_rate(ZEPHYR, factor=0.2) == 4e-6


@pytest.mark.parametrize(
    ("changed", "rate"),
    [
        ({}, 2e-4),  # as in TRL's examples
        ({"alpha": None}, 2e-5),  # TRL's default for full fine-tuning
        ({"width": 1024}, 4e-4),
        ({"alpha": 64.0}, 1e-4),
        ({"steps": 10, "tokens": 8}, 2e-4),  # the loss is a mean over tokens
    ],
)
def test_the_rate_of_instruction_tuning_follows_width_and_alpha(changed, rate):
    assert choose_supervised_rate(ZEPHYR._replace(**changed)) == rate
