import dataclasses

import pytest

from mlx_dpo.config import DPOConfig, options
from mlx_dpo.errors import ConfigError
from mlx_dpo.settings.training import PassLimit

GIVEN = {"model": "m", "pairs": "p", "output": "o"}


def test_what_is_saved_is_read_back():
    config = DPOConfig(**GIVEN, lora_target_modules=("q_proj",), bits=4, thinking=False)
    assert DPOConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", 0, "`beta` must be above 0, got 0.0"),
        ("label_smoothing", 0.5, "`label_smoothing` must be at least 0 and below 0.5, got 0.5"),
        ("label_smoothing", -0.1, "must be at least 0 and below 0.5"),
        ("valid_fraction", 1.0, "must be at least 0 and below 1"),
        ("bits", 7, "`bits` must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ("epochs", 0, "`epochs` must be at least 1, got 0"),
        ("epochs", 1.5, "`epochs` must be int, got 1.5"),
        ("epochs", True, "`epochs` must be int, got True"),
        ("learning_rate", "fast", "`learning_rate` must be a number, got 'fast'"),
        ("learning_rate", float("nan"), "`learning_rate` must be above 0"),
        ("learning_rate", float("inf"), "`learning_rate` must be above 0"),
        ("learning_rate", None, "`learning_rate` must be float, got nothing"),
        ("trust_remote_code", "yes", "`trust_remote_code` must be bool, got 'yes'"),
        ("truncation", "middle", "must be one of keep_start, keep_end, drop, got 'middle'"),
        ("model", 3, "`model` must be str, got 3"),
        ("lora_target_modules", [1], "`lora_target_modules` must be str, got 1"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_bounds(name, value, message):
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_dict(GIVEN | {name: value})
    assert message in str(error.value)


def test_yamls_numbers_without_a_point_are_numbers():
    """YAML 1.1 reads `5e-6` as text."""
    assert DPOConfig.from_dict({"learning_rate": "5e-6"}).learning_rate == 5e-6
    assert DPOConfig.from_dict({"beta": 1}).beta == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_size": 32}, "`group_size` has no effect without `bits`"),
        ({"valid": "v", "valid_fraction": 0.1}, "`valid_fraction` has no effect beside `valid`"),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.2},
            "`warmup_ratio` has no effect with lr_scheduler_type `constant`",
        ),
        ({"epochs": 2, "max_steps": 9}, "`epochs` has no effect beside `max_steps`"),
        ({"batch_size": 2, "micro_batch_size": 4}, "`micro_batch_size` 4 is above `batch_size` 2"),
        ({"micro_batch_size": 1, "max_tokens": 9}, "`max_tokens` has no effect with one pair per"),
        ({"batch_size": 1, "max_tokens": 9}, "`max_tokens` has no effect with one pair per pass"),
        (
            {"micro_batch_size": 2, "max_tokens": 476, "max_length": 100},
            "`max_tokens` 476 has no effect beside `micro_batch_size` 2 and `max_length` 100",
        ),
    ],
)
def test_settings_without_effect_are_refused(given, message):
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_dict(GIVEN | given)
    assert message in str(error.value)


def test_tokens_that_may_bound_a_pass_are_taken():
    DPOConfig(**GIVEN, micro_batch_size=2, max_tokens=475, max_length=100)
    DPOConfig(**GIVEN, max_tokens=10**6)


@pytest.mark.parametrize(
    ("typed", "meant"), [("learing_rate", "learning_rate"), ("lora-r", "lora_r")]
)
def test_an_unknown_setting_names_its_neighbour(typed, meant):
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_dict({typed: 1})
    assert str(error.value) == f"unknown setting `{typed}`; did you mean `{meant}`?"


def test_a_setting_like_no_other_is_only_unknown():
    with pytest.raises(ConfigError, match=r"^unknown setting `xyz`$"):
        DPOConfig.from_dict({"xyz": 1})


def test_defaults_depend_on_what_they_depend_on():
    assert DPOConfig().pass_limit == PassLimit(pairs=2)
    assert DPOConfig(batch_size=1).pass_limit == PassLimit(pairs=1)
    assert DPOConfig(max_tokens=512).pass_limit == PassLimit(tokens=512)
    both = DPOConfig(max_tokens=512, micro_batch_size=4)
    assert both.pass_limit == PassLimit(pairs=4, tokens=512)
    assert DPOConfig().warmup == 0.1
    assert DPOConfig(lr_scheduler_type="constant").warmup == 0.0
    assert DPOConfig().held_out_share == 0.05
    assert DPOConfig(valid="v").held_out_share == 0.0
    assert DPOConfig(lora_r=8, lora_alpha=4).lora_scale == 0.5


def test_the_defaults_are_the_published_ones():
    """LoRA range of TRL's documentation and of the alignment handbook; see docs."""
    config = DPOConfig()
    assert (config.learning_rate, config.beta) == (5e-6, 0.1)
    assert (config.batch_size, config.max_length, config.max_grad_norm) == (16, 1024, 1.0)
    assert (config.weight_decay, config.lora_dropout, config.lora_scale) == (0.0, 0.0, 2.0)


def test_the_first_differing_setting_that_matters_is_found():
    config = DPOConfig(**GIVEN)
    assert config.differing(dataclasses.replace(config, save_steps=9, output="x")) is None
    assert config.differing(dataclasses.replace(config, seed=1)) == "seed"


def test_every_setting_has_help_and_a_section():
    for name, (_, spec) in options().items():
        assert spec.help.endswith((".", "]")), name
        assert spec.section, name
