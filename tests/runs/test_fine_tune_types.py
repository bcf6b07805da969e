"""Runs in every way to adapt a model: exact at step one, resumed bit for bit, open afterwards."""

import json
import math
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo import DPOConfig, evaluate_run, load_policy
from mlx_dpo.errors import ConfigError, ModelError, RunError
from mlx_dpo.runs.folder import reference_provenance
from mlx_dpo.runs.summary import summarize_trainable
from tests.runs.test_trainer import TOKENS
from tests.runs.train_helper import train, weights

# Settings of a way; `bits` and the like belong to the base.
VARIANTS = {
    "dora": {"fine_tune_type": "dora"},
    "quantised dora": {"fine_tune_type": "dora", "bits": 3, "group_size": 32},
    "rslora": {"use_rslora": True},
    "embeddings": {"lora_target_modules": ("embed_tokens", "lm_head", "q_proj")},
    "full": {"fine_tune_type": "full", "lora_r": None, "lora_dropout": None},
    "named full": {
        "fine_tune_type": "full", "lora_r": None, "lora_dropout": None,
        "lora_target_modules": ("embed_tokens", "self_attn"), "num_layers": 1,
    },
    "full in sixteen bits": {
        "fine_tune_type": "full", "lora_r": None, "lora_dropout": None, "dtype": "bfloat16",
    },
    "dora in sixteen bits": {"fine_tune_type": "dora", "dtype": "bfloat16"},
}  # fmt: skip
STARTS = ("lora", "dora", "full")


@pytest.fixture
def config(settings):
    """Three steps, the second with a checkpoint."""
    return DPOConfig.from_dict(settings | {"epochs": 1, "scorer": "plain"})


def first_of(config, *, resume=False):
    config = replace(config, warmup_ratio=0.0, lora_dropout=None, learning_rate=1e-3)
    return train(config, stop_after=1, resume=resume)[1][0]


def assert_untrained(row):
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert row["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert row["rewards/rejected"] == pytest.approx(0, abs=1e-5)


def started(config, tmp_path, variant):
    """The settings of a run that starts from a finished one of this way."""
    plain = {"lora_r": None, "lora_dropout": None}
    first = replace(config, output=str(tmp_path / "first"), **VARIANTS.get(variant, {}))
    train(first)
    return replace(config, start_adapter=first.output, **plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_loss_is_log_two_but_not_after_a_resume(config, variant):
    config = replace(config, scorer="auto", **VARIANTS[variant])
    assert_untrained(first_of(config))
    assert first_of(config, resume=True)["loss"] != pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("variant", STARTS)
def test_the_first_loss_is_log_two_from_a_start_adapter(config, tmp_path, variant):
    config = started(config, tmp_path, variant)
    row = first_of(config)
    assert_untrained(row)
    base = load_policy(None, model=config.model).model
    first = load_policy(config.start_adapter).model
    assert not mx.allclose(first(TOKENS), base(TOKENS), atol=1e-4)


@pytest.mark.parametrize("variant", ["dora", "full in sixteen bits"])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(config, tmp_path, variant):
    config = replace(config, **VARIANTS[variant])
    straight = replace(config, output=str(tmp_path / "straight"))
    train(straight)
    train(config, stop_after=2)
    mx.random.seed(123)
    train(config, resume=True)
    for name, value in weights(straight).items():
        assert mx.array_equal(value, weights(config)[name]), name


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_sampled_answers_drift_from_the_model_with_the_start_adapter(config, tmp_path, variant):
    """What the start adapter had changed is no drift, also after a resume."""
    first = replace(config, learning_rate=1e-2, epochs=3)
    config = replace(started(first, tmp_path, variant), learning_rate=1e-12, epochs=1)
    record = json.loads((tmp_path / "first" / "run.json").read_text())
    assert record["evaluation"]["eval_completions/kl"] > 0.01
    train(config, stop_after=2)
    trainer, _ = train(config, resume=True)
    row = trainer.evaluation
    assert row["eval_completions/kl"] == pytest.approx(0, abs=1e-5)
    assert row["eval_completions/base_mean_length"] == row["eval_completions/mean_length"]
    assert row["eval_completions/base_repetition"] == row["eval_completions/repetition"]


@pytest.mark.parametrize("variant", ["dora", "full"])
def test_a_run_from_a_start_adapter_is_resumed_bit_for_bit(config, tmp_path, variant):
    config = started(config, tmp_path, variant)
    straight = replace(config, output=str(tmp_path / "straight"))
    train(straight)
    train(config, stop_after=2)
    # Asked again, and of the weights of the start, not of those of the checkpoint.
    shutil.rmtree(tmp_path / "run" / "reference")
    shutil.rmtree(tmp_path / "cache")
    _, rows = train(config, resume=True)
    for name, value in weights(straight).items():
        assert mx.array_equal(value, weights(config)[name]), name
    assert rows[0]["step"] == 3


@pytest.mark.parametrize("variant", ["dora", "rslora", "full", "full in sixteen bits"])
def test_policy_and_reference_load_here_and_in_mlx_lm(config, monkeypatch, tmp_path, variant):
    trainer, _ = train(replace(config, **VARIANTS[variant]))
    monkeypatch.chdir("/")
    policy = load_policy(config.output).model
    base = load_policy(config.output, reference=True).model
    if "sixteen" not in variant:  # mlx-lm computes in the type that is on the disk
        plain, _ = mlx_lm.load(config.model)
        theirs, _ = mlx_lm.load(config.model, adapter_path=config.output)
        assert mx.allclose(policy(TOKENS), theirs(TOKENS), atol=1e-4, rtol=1e-4)
        assert mx.allclose(base(TOKENS), plain(TOKENS), atol=1e-4, rtol=1e-4)
    assert not mx.allclose(policy(TOKENS), base(TOKENS), atol=1e-3)
    again = evaluate_run(config.output).metrics
    assert again.loss == pytest.approx(trainer.evaluation["eval_loss"], abs=1e-6)
    assert again.margins == pytest.approx(trainer.evaluation["eval_rewards/margins"], abs=1e-6)


@pytest.mark.parametrize("variant", STARTS)
def test_the_reference_of_a_start_is_the_model_with_it(config, tmp_path, variant):
    config = started(config, tmp_path, variant)
    trainer, _ = train(config)
    base = load_policy(config.output, reference=True).model
    first = load_policy(config.start_adapter).model
    assert mx.array_equal(base(TOKENS), first(TOKENS))
    policy, _ = mlx_lm.load(config.model, adapter_path=config.output)
    assert not mx.allclose(policy(TOKENS), first(TOKENS), atol=1e-4)
    again = evaluate_run(config.output).metrics
    assert again.loss == pytest.approx(trainer.evaluation["eval_loss"], abs=1e-6)
    assert again.margins == pytest.approx(trainer.evaluation["eval_rewards/margins"], abs=1e-6)
    assert again.chosen_logps == pytest.approx(trainer.evaluation["eval_logps/chosen"], abs=1e-4)


def test_a_start_adapter_is_part_of_where_a_run_comes_from(config, tmp_path):
    config = started(config, tmp_path, "lora")
    trainer, _ = train(config, stop_after=1)
    other = trainer.record | {"provenance": trainer.record["provenance"] | {"start_adapter": "x"}}
    without = trainer.record | {
        "provenance": {**trainer.record["provenance"], "start_adapter": None}
    }
    held = "cpu float32"
    assert len({reference_provenance(r, held) for r in (trainer.record, other, without)}) == 3

    path = tmp_path / "first" / "adapters.safetensors"
    arrays = mx.load(str(path))
    mx.eval(arrays)
    mx.save_safetensors(str(path), {name: 2 * value for name, value in arrays.items()})
    with pytest.raises(RunError, match="the start adapter changed since the run began"):
        train(config, resume=True)
    with pytest.raises(RunError, match="the start adapter changed since the run began"):
        load_policy(config.output, reference=True)


def test_a_start_adapter_that_is_gone_is_named(config, tmp_path):
    config = started(config, tmp_path, "lora")
    train(config)
    shutil.rmtree(tmp_path / "first")
    load_policy(config.output)
    with pytest.raises(
        RunError, match=r"the adapter of .*first, which does not exist; restore it there"
    ):
        load_policy(config.output, reference=True)
    with pytest.raises(RunError, match="which does not exist"):
        evaluate_run(config.output)


def test_a_run_moved_with_its_start_still_opens(config, tmp_path):
    (tmp_path / "here").mkdir()
    config = replace(
        started(replace(config), tmp_path / "here", "lora"), output=str(tmp_path / "here" / "run")
    )
    train(config)
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    assert evaluate_run(str(tmp_path / "elsewhere" / "run")).pairs == 3


def test_a_run_can_start_from_the_adapters_of_a_checkpoint(config, tmp_path):
    first = replace(config, output=str(tmp_path / "first"))
    train(first, stop_after=2)
    plain = {"lora_r": None, "lora_dropout": None}
    folder = tmp_path / "first" / "checkpoints" / "step-000002"
    assert_untrained(first_of(replace(config, start_adapter=str(folder), **plain)))


@pytest.mark.parametrize("folder", ["nowhere", "first"])
def test_where_no_adapter_is_a_run_is_refused_before_anything_is_loaded(config, tmp_path, folder):
    if folder == "first":
        train(replace(config, output=str(tmp_path / "first")), stop_after=1)
    plain = {"lora_r": None, "lora_dropout": None, "start_adapter": str(tmp_path / folder)}
    shutil.rmtree(config.model)
    with pytest.raises(ModelError, match=rf"{folder}.*(no `adapter_config.json`|cannot be read)"):
        train(replace(config, **plain))
    assert not (tmp_path / "run").exists()


def test_packed_weights_are_not_trained_themselves(config, tmp_path):
    full = replace(config, **VARIANTS["full"])
    with pytest.raises(ConfigError, match=r"the model is quantized.*use the model without --bits"):
        train(replace(full, bits=4))
    mlx_lm.convert(config.model, str(tmp_path / "packed"), quantize=True, q_bits=4)
    with pytest.raises(ConfigError, match="use the unquantized model"):
        train(replace(full, model=str(tmp_path / "packed")))


def test_trained_weights_go_on_from_unpacked_ones_alone(config, tmp_path):
    config = started(config, tmp_path, "full")
    with pytest.raises(ConfigError, match=r"the model is quantized.*use the model without --bits"):
        train(replace(config, bits=4))


def test_dropout_has_no_effect_on_trained_weights_that_a_run_starts_from(config, tmp_path):
    config = started(config, tmp_path, "full")
    with pytest.raises(ConfigError, match="`lora_dropout` has no effect: `start_adapter` has no"):
        train(replace(config, lora_dropout=0.1))


def test_the_adapter_file_says_what_mlx_lm_wants(config):
    trainer, _ = train(replace(config, use_rslora=True, lora_alpha=6.0, num_layers=1))
    saved = json.loads((trainer.paths.folder / "adapter_config.json").read_text())
    assert (saved["fine_tune_type"], saved["num_layers"]) == ("lora", 1)
    parameters = saved["lora_parameters"]
    assert parameters["scale"] == 3.0  # 6 / sqrt(4)
    assert (parameters["rank"], parameters["dropout"]) == (4, 0.1)
    assert len(parameters["keys"]) == 7


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("dora", "adapters: DoRA, rank 4, alpha 32 on 14 linear layers: "),
        ("rslora", "adapters: LoRA, rank 4, alpha 32 / sqrt(rank) on 14 linear layers: "),
        ("quantised dora", "mlx-lm itself cannot load DoRA on 3-bit layers; mlx-dpo can"),
        ("embeddings", "LoRA, rank 4, alpha 32 on 3 linear layers and the embeddings: "),
        ("full", "weights: full fine-tuning, in 2 of 2 blocks: 82.2 K parameters trained, "),
        ("named full", "weights: full fine-tuning, in 1 of 2 blocks and model.embed_tokens: "),
        ("full in sixteen bits", "stored in float32, computed in bfloat16"),
    ],
)
def test_the_header_describes_the_trained_weights(config, variant, message):
    trainer, _ = train(replace(config, **VARIANTS[variant]), stop_after=1)
    entries = trainer.inputs.base.config
    lines = [
        f"{name}: {line}"
        for name, line in summarize_trainable(trainer.policy, trainer.config, entries)
    ]
    assert any(message in line for line in lines), lines
