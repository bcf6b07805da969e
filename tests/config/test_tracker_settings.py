"""Settings of the trackers, and those that would have no effect."""

import pytest

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ConfigError
from mlx_dpo.trackers import TRACKERS

GIVEN = {"model": "m", "pairs": "p", "output": "o"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run_name": "n"}, "`run_name` has no effect without `report_to`"),
        ({"project": "p"}, "`project` has no effect without `report_to`"),
        (
            {"project": "p", "report_to": "tensorboard"},
            "`project` has no effect with report_to tensorboard alone, which names a run after "
            "its folder",
        ),
        (
            {"run_name": "n", "report_to": ["tensorboard"]},
            "`run_name` has no effect with report_to tensorboard alone, which names a run after "
            "its folder",
        ),
        ({"report_to": ["wandb", "wandb"]}, "`report_to` contains wandb twice"),
        ({"report_to": ["none", "wandb"]}, "`report_to` none contradicts wandb"),
        (
            {"report_to": "mlflow"},
            f"`report_to` must be one of {', '.join(TRACKERS)}, none, got 'mlflow'",
        ),
        ({"report_to": "wandb", "run_name": " "}, "`run_name` is empty; give a name, or leave it "
        "out"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_an_error(given, message):
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_dict(GIVEN | given)
    assert str(error.value) == message


def test_names_have_an_effect_if_one_of_the_trackers_uses_them():
    config = DPOConfig(**GIVEN, report_to=("tensorboard", "wandb"), run_name="n", project="p")
    assert (config.tracker_names, config.has_run_name) == (("tensorboard", "wandb"), True)


def test_none_is_no_tracker_and_keeps_the_name_of_a_resumed_run():
    config = DPOConfig(**GIVEN, report_to=("none",), run_name="n")
    assert (config.tracker_names, config.has_run_name) == ((), False)


def test_trackers_do_not_change_the_result():
    tracked = DPOConfig(**GIVEN, report_to=("wandb",), run_name="n", project="p")
    assert DPOConfig(**GIVEN).find_difference(tracked) is None
    assert tracked.get_public_settings() == {} and tracked.list_private_settings() == []


def test_private_settings_are_listed_as_withheld_and_not_shared():
    private = {"system": "Be brief", "revision": "main", "valid": "held.jsonl", "beta": 0.2}
    config = DPOConfig(**GIVEN, **private)
    assert config.get_public_settings() == {"beta": 0.2}
    assert sorted(config.list_private_settings()) == ["revision", "system"]
