"""Dataset settings that would have no effect are errors before any file is read."""

import pytest

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ConfigError
from mlx_dpo.schemas import SCHEMA_NAMES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mix": (1.0, 1.0), "pairs": ("a", "b")}, "`mix` has no effect with weights of 1"),
        ({"mix": (0.5,), "pairs": ("a", "b")}, "`mix` has 1 weights for 2 sources"),
        ({"mix": (0.0,), "pairs": ("a",)}, "`mix` must be above 0"),
        ({"column": ("prompt",)}, "`column` must be NAME=COLUMN, each name once, got 'prompt'"),
        ({"column": ("a=b", "a=c")}, "`column` must be NAME=COLUMN, each name once, got 'a=c'"),
        ({"column": ("=b",)}, "`column` must be NAME=COLUMN"),
        ({"column": ("a=a",)}, "`column` has no effect if both names are the same"),
        ({"system": " "}, "`system` has no effect if it is empty"),
        ({"system": "x", "chat_template": "text"}, "`system` has no effect if it is empty or"),
        ({"schema": "sharegp"}, f"`schema` must be one of {', '.join(SCHEMA_NAMES)}, got"),
        ({"schema": "labelled"}, "`schema` labelled needs --loss-type kto, or --pair-labelled"),
        ({"pair_labelled": True, "loss_type": ("kto",)}, "`pair_labelled` cannot go with a `loss_"),
        ({"pair_labelled": True, "weight_column": "w"}, "`pair_labelled` cannot go with `weight_c"),
        (
            {"pair_labelled": True, "loss_type": "sft"},
            "`pair_labelled` cannot go with loss_type",
        ),
        (
            {"ranked": "all", "loss_type": "sft"},
            "`ranked` all cannot go with loss_type `sft`",
        ),
        ({"schema": "text"}, "`schema` text has rows of one answer, and needs --loss-type sft"),
        ({"assistant_turns": "last"}, "`assistant_turns` acts on instruction tuning only"),
        (
            {"assistant_turns": "all", "loss_type": ("sigmoid", "sft")},
            "`assistant_turns` acts on instruction tuning only",
        ),
        ({"use_weighting": True, "loss_type": "sft"}, "`use_weighting` has no effect with loss_t"),
    ],
)
def test_a_setting_without_effect_is_an_error(given, message):
    with pytest.raises(ConfigError) as error:
        DPOConfig(**given)
    assert str(error.value).startswith(message)


def test_sources_are_one_or_several_and_survive_a_round_trip():
    for given in ("a.jsonl", ["a.jsonl"], ("a.jsonl",)):
        config = DPOConfig(pairs=given)
        assert config.pairs == ("a.jsonl",)
        assert DPOConfig.from_dict(config.to_dict()) == config
    several = DPOConfig(pairs=("a", "-", "org/name:en@main"), mix=(1, 2, 0.5))
    assert DPOConfig.from_dict(several.to_dict()) == several


def test_columns_map_field_names_to_columns():
    config = DPOConfig(column=("prompt=input.question", "chosen=a=b"))
    assert config.columns == {"prompt": "input.question", "chosen": "a=b"}
