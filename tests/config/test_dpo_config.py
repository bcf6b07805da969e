import copy
import dataclasses
import pickle
import re

import pytest

from mlx_dpo.config.dpo_config import DPOConfig, get_settings, rename_earlier_settings
from mlx_dpo.config.other_trainers import EQUIVALENTS, LOSS_NAMES
from mlx_dpo.config.training import PassLimit
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.notices import notify_once
from mlx_dpo.losses.catalogue import LOSSES

BEST = {"load_best_model_at_end": True, "eval_steps": 5}
GIVEN = {"model": "m", "pairs": "p", "output": "o"}


def test_a_saved_config_is_read_back():
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
        ("batch_size", None, "`batch_size` must be int, got no value"),
        ("trust_remote_code", "yes", "`trust_remote_code` must be bool, got 'yes'"),
        ("truncation", "middle", "must be one of keep_start, keep_end, drop, got 'middle'"),
        ("model", 3, "`model` must be str, got 3"),
        ("lora_target_modules", [1], "`lora_target_modules` must be str, got 1"),
    ],
)
def test_an_invalid_value_is_reported_with_its_bounds(name, value, message):
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_dict(GIVEN | {name: value})
    assert message in str(error.value)


def test_yaml_numbers_without_a_decimal_point_are_numbers():
    """YAML 1.1 reads `5e-6` as text."""
    assert DPOConfig.from_dict({"learning_rate": "5e-6"}).learning_rate == 5e-6
    assert DPOConfig.from_dict({"beta": 1}).beta == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_size": 32}, "`group_size` has no effect without `bits`"),
        (
            {"valid": "v", "valid_fraction": 0.1},
            "`valid_fraction` has no effect together with `valid`",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.2},
            "`warmup_ratio` has no effect with lr_scheduler_type `constant`",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 2},
            "`warmup_steps` has no effect with lr_scheduler_type `constant`",
        ),
        (
            {"warmup_ratio": 0.1, "warmup_steps": 2},
            "`warmup_ratio` has no effect together with `warmup_steps`",
        ),
        (
            {"min_lr_rate": 0.2},
            "`min_lr_rate` has no effect with lr_scheduler_type `cosine`; use `cosine_with_min_lr`",
        ),
        ({"optim": "adam", "weight_decay": 0.1}, "`weight_decay` has no effect with optim `adam`"),
        ({"optim": "rmsprop", "weight_decay": 0.1}, "`weight_decay` has no effect with optim `rm"),
        ({"optim": "lion", "adam_epsilon": 1e-6}, "`adam_epsilon` has no effect with optim `lion`"),
        ({"optim": "sgd", "adam_beta1": 0.9}, "`adam_beta1` has no effect with optim `sgd`"),
        ({"optim": "muon", "adam_beta2": 0.9}, "`adam_beta2` has no effect with optim `muon`"),
        ({"momentum": 0.0}, "`momentum` has no effect with optim `adamw`"),
        (
            {"load_best_model_at_end": True},
            "`load_best_model_at_end` has no effect without `metric_for_best_model`",
        ),
        (
            {"early_stopping_patience": 2},
            "`early_stopping_patience` has no effect without `metric_for_best_model`",
        ),
        (
            {"early_stopping_threshold": 0.1},
            "`early_stopping_threshold` has no effect without `early_stopping_patience`",
        ),
        (
            {"metric_for_best_model": "loss", "eval_steps": 5},
            "`metric_for_best_model` has no effect without `early_stopping_patience` or `load_best",
        ),
        (
            {"metric_for_best_model": "loss", "load_best_model_at_end": True},
            "`load_best_model_at_end` has no effect without `eval_steps`",
        ),
        *[
            (
                {"fine_tune_type": "full", name: value},
                f"`{name}` has no effect with fine_tune_type `full`, which has no adapters",
            )
            for name, value in (
                ("lora_r", 8),
                ("lora_alpha", 8),
                ("use_rslora", True),
                ("lora_dropout", 0.1),
            )
        ],
        *[
            (
                {"start_adapter": "a", name: value},
                f"`{name}` has no effect together with `start_adapter`, whose own settings apply",
            )
            for name, value in (
                ("lora_r", 8),
                ("lora_alpha", 8),
                ("use_rslora", True),
                ("num_layers", 1),
                ("fine_tune_type", "lora"),
                ("lora_target_modules", ["q_proj"]),
            )
        ],
        *[
            ({"loss_type": "ipo", name: value}, f"`{name}` has no effect with loss_type `ipo`; it")
            for name, value in (
                ("label_smoothing", 0.1),
                ("discopop_tau", 0.1),
                ("dpop_lambda", 5),
                ("simpo_gamma", 1),
                ("cpo_alpha", 1),
                ("desirable_weight", 2),
                ("undesirable_weight", 2),
            )
        ],
        (
            {"loss_type": ["sft"], "beta": 0.2},
            "`beta` has no effect with loss_type `sft`; it acts on all but `sft`",
        ),
        ({"cpo_alpha": 0.0}, "`cpo_alpha` has no effect with loss_type `sigmoid`; it acts on `cp"),
        (
            {"f_alpha_divergence_coef": 0.3, "f_divergence_type": "forward_kl"},
            "`f_alpha_divergence_coef` has no effect without f_divergence_type `alpha_divergence`",
        ),
        (
            {"loss_type": "sft", "f_divergence_type": "js_divergence"},
            "`f_divergence_type` has no effect with loss_type `sft`; it acts on `sigmoid`, `cdpo`",
        ),
        ({"epochs": 2, "max_steps": 9}, "`epochs` has no effect together with `max_steps`"),
        ({"batch_size": 2, "micro_batch_size": 4}, "`micro_batch_size` 4 is above `batch_size` 2"),
        (
            {"micro_batch_size": 1, "micro_batch_tokens": 9},
            "`micro_batch_tokens` has no effect with one pair per",
        ),
        (
            {"batch_size": 1, "micro_batch_tokens": 9},
            "`micro_batch_tokens` has no effect with one pair per forward pass",
        ),
        (
            {"micro_batch_size": 2, "micro_batch_tokens": 476, "max_length": 100},
            "`micro_batch_tokens` has no effect together with `micro_batch_size` 2",
        ),
    ],
)
def test_settings_without_effect_are_errors(given, message):
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_dict(GIVEN | given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": "sigmod"}, "unknown loss `sigmod`; did you mean `sigmoid`?"),
        ({"loss_type": "xyz"}, "unknown loss `xyz`; `mlx-dpo losses` lists them"),
        ({"loss_type": "[" * 3000}, f"unknown loss `{'[' * 80}…`; `mlx-dpo losses` lists them"),
        ({"loss_type": []}, "`loss_type` is empty; `mlx-dpo losses` lists them"),
        ({"loss_type": ["ipo", "ipo"]}, "`loss_type` names `ipo` twice; use `loss_weights`"),
        (
            {"loss_type": ["ipo", "sft"], "loss_weights": [1, 2, 3]},
            "`loss_weights` must have as many entries as `loss_type` (found 3 and 2)",
        ),
        ({"loss_weights": [0]}, "`loss_weights` must be above 0, got 0.0"),
        (
            {"loss_type": ["kto", "sft"]},
            "`kto` takes labelled rows and cannot be summed with losses of pairs",
        ),
        *[
            (
                {"loss_type": name, "label_smoothing": 0},
                f"`label_smoothing` must be above 0 with loss_type `{name}`, got 0.0",
            )
            for name in ("cdpo", "robust", "exo_pair")
        ],
        (
            {"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"},
            "`f_divergence_type` forward_kl is not defined for loss_type `nca_pair`; use",
        ),
        *[
            (
                {"loss_type": ["sigmoid", name] if name != "kto" else name, "ld_alpha": 0.5},
                f"`ld_alpha` is not defined for loss_type `{name}`",
            )
            for name in ("sft", "cpo", "simpo", "orpo", "kto")
        ],
        *[
            (
                {"loss_type": name, "use_weighting": True},
                f"`use_weighting` is not defined for loss_type `{name}`",
            )
            for name in ("aot", "aot_unpaired", "kto", "plackett_luce", "lipo_lambda")
        ],
        *[
            (
                {"loss_type": ["plackett_luce", name]},
                f"cannot be summed with the reference-free `{name}`; leave one of them out",
            )
            for name in ("simpo", "cpo", "orpo")
        ],
        (
            {"loss_type": ["plackett_luce", "kto"]},
            "`kto` takes labelled rows and cannot be summed with losses of pairs",
        ),
        (
            {"loss_type": "lipo_lambda", "ld_alpha": 0.5},
            "`ld_alpha` is not defined for loss_type `lipo_lambda`: a completion would have",
        ),
        *[
            (
                {"loss_type": "plackett_luce", "ranked": how},
                f"`ranked` {how} makes no lists; loss_type `plackett_luce` needs `ranked` all",
            )
            for how in ("best_worst", "adjacent")
        ],
        (
            {"loss_type": "plackett_luce", "group_by_prompt": False},
            "`group_by_prompt` false would divide lists between steps; loss_type `plackett_luce`",
        ),
        (
            {"loss_type": "plackett_luce", "pair_labelled": True},
            "`pair_labelled` makes pairs, not lists; loss_type `plackett_luce` needs rows with",
        ),
        (
            {"loss_type": "lipo_lambda", "pairs": ["a", "b"], "mix": [2, 0.5]},
            "`mix` must be whole numbers with loss_type `lipo_lambda`: a fraction draws single",
        ),
        (
            {"loss_type": "sft", "metric_for_best_model": "eval_rewards/margins"} | BEST,
            "`metric_for_best_model` rewards/margins is a metric of preferences; with loss_type",
        ),
        (
            {"loss_type": ["sft", "ipo"], "metric_for_best_model": "mean_token_accuracy"} | BEST,
            "mean_token_accuracy is a metric of instruction tuning (--loss-type sft alone); use",
        ),
        (
            {"loss_type": ["sigmoid", "rpo_bwd_kl"], "margin_column": "score"},
            "`loss_type` `sigmoid`, `rpo_bwd_kl` cannot be summed: the margin column is a score",
        ),
    ],
)
def test_incompatible_losses_and_settings_are_errors(given, message):
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_dict(GIVEN | given)
    assert message in str(error.value)


def test_compatible_losses_and_settings_are_accepted():
    DPOConfig(loss_type=["sft", "sigmoid"], use_weighting=True)
    DPOConfig(loss_type=["sigmoid", "sft", "cpo"], f_divergence_type="js_divergence")
    DPOConfig(loss_type="nca_pair", f_divergence_type="reverse_kl", ld_alpha=0.0)
    DPOConfig(loss_type="aot", ld_alpha=0.5, label_smoothing=0.0)
    DPOConfig(loss_type=["plackett_luce", "sft"], weight_column="trust", ranked="all", mix=[2.0])
    DPOConfig(loss_type="lipo_lambda", f_divergence_type="js_divergence")
    DPOConfig(loss_type="rpo_bwd_kl", margin_column="score", ld_alpha=0.5)


def test_a_setting_overrides_the_default_of_each_loss():
    def read(name, **given):
        config = DPOConfig(**given)
        return [vars(config.get_hyperparameters(loss))[name] for loss in config.losses]

    assert read("beta") == [0.1]
    assert read("beta", loss_type=["simpo", "sigmoid"]) == [2.0, 2.0]  # one for all: the first's
    assert read("beta", loss_type=["simpo", "sigmoid"], beta=0.3) == [0.3, 0.3]
    assert DPOConfig(loss_type=["sft", "sppo_hard"]).common_beta == 0.001
    assert DPOConfig(loss_type="sft").common_beta == 0.1
    assert read("label_smoothing", loss_type=["sigmoid", "cdpo"]) == [0.0, 0.1]  # each its own
    assert read("label_smoothing", loss_type=["sigmoid", "cdpo"], label_smoothing=0.2) == [0.2] * 2
    assert read("simpo_gamma", loss_type="simpo", simpo_gamma=0) == [0.0]
    assert DPOConfig(loss_type=["ipo", "sft"]).weights_of_losses == (1.0, 1.0)


def test_a_sum_needs_what_one_of_its_losses_needs():
    assert DPOConfig().needs_reference and not DPOConfig(loss_type=["cpo", "sft"]).needs_reference
    assert DPOConfig(loss_type=["cpo", "ipo"]).needs_reference
    assert DPOConfig(loss_type=["ipo", "aot"]).uses_whole_batch and not DPOConfig().uses_whole_batch
    assert DPOConfig(loss_type="kto").labelled and not DPOConfig(loss_type="aot").labelled


def test_micro_batch_tokens_that_can_limit_a_pass_is_accepted():
    DPOConfig(**GIVEN, micro_batch_size=2, micro_batch_tokens=475, max_length=100)
    DPOConfig(**GIVEN, micro_batch_tokens=10**6)


@pytest.mark.parametrize(
    ("typed", "meant"), [("learing_rate", "learning_rate"), ("lora-r", "lora_r")]
)
def test_an_unknown_setting_names_its_neighbour(typed, meant):
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_dict({typed: 1})
    assert str(error.value) == f"unknown setting `{typed}`; did you mean `{meant}`?"


def test_the_setting_of_another_trainer_is_answered_with_its_equivalent():
    with pytest.raises(ConfigError, match=r"^unknown setting `num_train_epochs`; use `epochs`$"):
        DPOConfig.from_dict({"num_train_epochs": 3})


def test_equivalents_are_settings_and_names_of_other_trainers_are_not():
    assert not EQUIVALENTS.keys() & get_settings().keys()
    for name, advice in EQUIVALENTS.items():
        names = re.findall(r"`(\w+)`", advice)
        assert set(names) <= get_settings().keys(), name


def test_an_unknown_setting_without_a_neighbour_gets_no_hint():
    with pytest.raises(ConfigError, match=r"^unknown setting `xyz`$"):
        DPOConfig.from_dict({"xyz": 1})


def test_defaults_that_depend_on_other_settings():
    assert DPOConfig().pass_limit == PassLimit(pairs=2)
    assert DPOConfig(batch_size=1).pass_limit == PassLimit(pairs=1)
    assert DPOConfig(micro_batch_tokens=512).pass_limit == PassLimit(tokens=512)
    both = DPOConfig(micro_batch_tokens=512, micro_batch_size=4)
    assert both.pass_limit == PassLimit(pairs=4, tokens=512)
    assert DPOConfig().count_warmup_steps(total_steps=101) == 11
    assert [DPOConfig().count_warmup_steps(total_steps=n) for n in (1, 2, 3)] == [0, 0, 1]
    assert DPOConfig(warmup_steps=1).count_warmup_steps(total_steps=2) == 1
    assert DPOConfig(warmup_ratio=0.0).count_warmup_steps(total_steps=101) == 0
    assert DPOConfig(warmup_steps=7).count_warmup_steps(total_steps=101) == 7
    assert DPOConfig(lr_scheduler_type="constant").count_warmup_steps(total_steps=101) == 0
    assert DPOConfig().final_lr_share == 0.0
    assert DPOConfig(lr_scheduler_type="cosine_with_min_lr").final_lr_share == 0.1
    assert DPOConfig().held_out_fraction == 0.05
    assert DPOConfig(valid="v").held_out_fraction == 0.0
    assert DPOConfig(lora_r=8, lora_alpha=4).lora_scale == 0.5
    assert DPOConfig(lora_r=16, lora_alpha=4, use_rslora=True).lora_scale == 1.0
    assert DPOConfig(start_adapter="a", lora_dropout=0.1).dropout == 0.1


def test_the_defaults_are_the_published_ones():
    """TRL's, except for the learning rate (optim/default_learning_rate.py)."""
    config = DPOConfig()
    assert (config.learning_rate, config.common_beta) == (None, 0.1)
    assert (config.batch_size, config.length_limit, config.max_grad_norm) == (16, 1024, 1.0)
    assert (config.weight_decay, config.dropout, config.lora_scale) == (0.0, 0.0, 2.0)


def test_the_first_differing_setting_that_changes_the_result_is_found():
    config = DPOConfig(**GIVEN)
    assert config.find_difference(dataclasses.replace(config, save_steps=9, output="x")) is None
    assert config.find_difference(dataclasses.replace(config, seed=1)) == "seed"


def test_eval_steps_change_the_result_if_a_metric_selects_the_model():
    config = DPOConfig(**GIVEN, eval_steps=5)
    assert config.find_difference(dataclasses.replace(config, eval_steps=6)) is None
    config = dataclasses.replace(config, metric_for_best_model="loss", early_stopping_patience=1)
    assert config.find_difference(dataclasses.replace(config, eval_steps=6)) == "eval_steps"


def test_every_setting_has_help_and_a_section():
    for name, spec in get_settings().items():
        assert spec.help.endswith((".", "]")), name
        assert spec.section, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lerning_rate", "unknown setting `lerning_rate`; did you mean `learning_rate`?"),
        ("per_device_train_batch_size", "unknown setting `per_device_train_batch_size`; "),
    ],
)
def test_an_unknown_keyword_is_answered_as_an_unknown_key(name, message):
    with pytest.raises(ConfigError) as of_keyword:
        DPOConfig(**{name: 4})
    with pytest.raises(ConfigError) as of_key:
        DPOConfig.from_dict({name: 4})
    assert str(of_keyword.value) == str(of_key.value)
    assert str(of_keyword.value).startswith(message)


def test_settings_survive_copying_and_pickling():
    config = DPOConfig(beta=0.2)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(("name", "here"), [("kto_pair", "kto"), ("aot_pair", "aot")])
def test_the_loss_of_another_trainer_is_answered_with_its_name_here(name, here):
    with pytest.raises(ConfigError) as error:
        DPOConfig(loss_type=(name,))
    assert str(error.value) == f"unknown loss `{name}`; it is `{here}` here"


@pytest.mark.parametrize("name", ["dpo", "DPO"])
def test_dpo_is_a_name_of_sigmoid_and_a_notice_says_so(name, caplog):
    notify_once.cache_clear()
    assert DPOConfig(loss_type=name).to_dict()["loss_type"] == ["sigmoid"]
    assert caplog.messages == [f"loss `{name}` is recorded as `sigmoid`, TRL's name for it"]


def test_records_of_earlier_versions_are_read_and_old_names_are_answered():
    earlier = DPOConfig(micro_batch_tokens=9).to_dict()
    earlier["max_tokens"] = earlier.pop("micro_batch_tokens")
    assert DPOConfig.from_dict(rename_earlier_settings(earlier)).micro_batch_tokens == 9
    with pytest.raises(ConfigError, match=r"`max_tokens`; use `micro_batch_tokens`$"):
        DPOConfig.from_dict(earlier)


def test_names_of_other_trainers_losses_are_no_losses_and_lead_to_losses():
    assert not LOSS_NAMES.keys() & LOSSES.keys()
    assert set(LOSS_NAMES.values()) <= LOSSES.keys()


@pytest.mark.parametrize("value", [10**400, "a\0b"])
def test_values_that_nothing_can_hold_are_refused(value):
    with pytest.raises(ConfigError):
        DPOConfig(**{"beta" if isinstance(value, int) else "model": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_r", 10**14), ("max_steps", 10**23), ("lora_alpha", 1e300), ("learning_rate", 1e300),
     ("seed", 10**26), ("mix", 1e300)],
)  # fmt: skip
def test_a_number_out_of_all_bounds_is_refused_with_the_bound(name, value):
    with pytest.raises(ConfigError, match=rf"^`{name}` must be .*at most .*, got "):
        DPOConfig(**{name: value})


@pytest.mark.parametrize("rows", [[{"prompt": "a"}], {"prompt": "a"}, range(3)])
def test_pairs_in_memory_are_directed_to_the_trainer(rows):
    for name, argument in (("pairs", "train_dataset"), ("valid", "eval_dataset")):
        with pytest.raises(ConfigError, match=f"`{name}` names .*`{argument}` of DPOTrainer"):
            DPOConfig(**{name: rows})
