"""Which programs are told, and which of their settings would have no effect."""

import pytest

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ConfigError

GIVEN = {"model": "m", "pairs": "p", "output": "o"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run_name": "n"}, "`run_name` has no effect without `report_to`"),
        ({"project": "p"}, "`project` has no effect without `report_to`"),
        (
            {"project": "p", "report_to": "tensorboard"},
            "`project` has no effect with report_to tensorboard alone, which knows runs by their "
            "folders",
        ),
        (
            {"run_name": "n", "report_to": ["tensorboard"]},
            "`run_name` has no effect with report_to tensorboard alone, which knows runs by their "
            "folders",
        ),
        ({"report_to": ["wandb", "wandb"]}, "`report_to` names wandb twice"),
        ({"report_to": ["none", "wandb"]}, "`report_to` none contradicts wandb"),
        (
            {"report_to": "mlflow"},
            "`report_to` must be one of tensorboard, wandb, trackio, swanlab, none, got 'mlflow'",
        ),
        ({"report_to": "wandb", "run_name": " "}, "`run_name` is empty; give a name, or leave it "
         "out"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(given, message):
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_dict(GIVEN | given)
    assert str(error.value) == message


def test_names_act_where_one_of_the_programs_knows_names():
    config = DPOConfig(**GIVEN, report_to=("tensorboard", "wandb"), run_name="n", project="p")
    assert (config.reports_to, config.named_there) == (("tensorboard", "wandb"), True)


def test_none_tells_nobody_and_keeps_the_names_of_a_run_that_is_resumed():
    config = DPOConfig(**GIVEN, report_to=("none",), run_name="n")
    assert (config.reports_to, config.named_there) == ((), False)


def test_telling_does_not_change_the_result():
    told = DPOConfig(**GIVEN, report_to=("wandb",), run_name="n", project="p")
    assert DPOConfig(**GIVEN).differing(told) is None
    assert told.shareable() == {} and told.withheld() == []


def test_what_is_nobody_elses_business_is_named_and_not_told():
    private = {"system": "Be brief", "revision": "main", "valid": "held.jsonl", "beta": 0.2}
    config = DPOConfig(**GIVEN, **private)
    assert config.shareable() == {"beta": 0.2}
    assert sorted(config.withheld()) == ["revision", "system"]
