"""Configurations of other trainers become settings that `train --config` accepts."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.cli.setting_flags import read_settings
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.translation.trainers import CONVERTERS, MARKS, OTHER_DEFAULTS
from mlx_dpo.config.translation.translate import translate
from mlx_dpo.errors import ConfigError

TRL = """\
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: me/preferences
dataset_config: english
dataset_train_split: train
learning_rate: 1e-5
num_train_epochs: 1.5
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
loss_type: [sigmoid]
beta: 0.1
max_length: 1024
bf16: true
fp16: false
use_peft: true
lora_r: 32
lora_target_modules: [q_proj, v_proj]
eval_strategy: steps
eval_steps: 50
report_to: [wandb, mlflow]
output_dir: qwen-dpo
push_to_hub: true
hub_token:
"""
LLAMA_FACTORY = """\
### model
model_name_or_path: meta-llama/Llama-3.2-3B-Instruct
quantization_bit: 4
### method
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.2
pref_loss: sigmoid
pref_ftx: 0.3
### dataset
dataset: dpo_en_demo, mine
template: llama3
cutoff_len: 2048
max_samples: 1000
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
output_dir: saves/llama3
"""
AXOLOTL = """\
base_model: mistralai/Mistral-7B-Instruct-v0.3
load_in_8bit: false
load_in_4bit: true
rl: ipo
rl_beta: 0.2
datasets:
  - path: me/orca
    split: train
    type: chatml
  - path: me/other
    split: train
val_set_size: 0.05
sequence_len: 4096
adapter: qlora
lora_r: 16
lora_target_linear: true
wandb_project: mine
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
output_dir: ./out
"""
MLX_LM_LORA = """\
model: mlx-community/Qwen3-4B-4bit
data: my-data
train: true
train_mode: dpo
train_type: dora
iters: 400
batch_size: 2
gradient_accumulation_steps: 4
num_layers: -1
learning_rate: 1e-5
dpo_cpo_loss_type: hinge
lora_parameters: {rank: 8, scale: 20.0, dropout: 0.05, keys: [self_attn.q_proj, mlp.up_proj]}
steps_per_eval: 100
adapter_path: adapters
"""
UNSLOTH = """\
model_name: unsloth/Qwen3-4B
max_seq_length: 2048
load_in_4bit: true
r: 16
target_modules: [q_proj, k_proj]
use_gradient_checkpointing: unsloth
random_state: 3407
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
optim: adamw_8bit
output_dir: outputs
"""
EXPECTED = {
    "TRL": (
        TRL,
        {
            "model": "Qwen/Qwen3-0.6B", "pairs": ["me/preferences:english"], "split": "train",
            "learning_rate": 1e-5, "epochs": 2, "batch_size": 16, "micro_batch_size": 2,
            "recompute": True, "loss_type": ["sigmoid"], "beta": 0.1, "max_length": 1024,
            "dtype": "bfloat16", "fine_tune_type": "lora", "lora_r": 32,
            "lora_target_modules": ["q_proj", "v_proj"], "eval_steps": 50,
            "report_to": ["wandb"], "output": "qwen-dpo",
        },
        ["# epochs: 1.5 epochs are rounded up", "# report_to: mlflow is not supported",
         "#   push_to_hub: True: use `mlx-dpo push` after training"],
    ),
    "LLaMA-Factory": (
        LLAMA_FACTORY,
        {
            "model": "meta-llama/Llama-3.2-3B-Instruct", "bits": 4, "fine_tune_type": "lora",
            "lora_r": 8, "beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3],
            "pairs": ["dpo_en_demo", "mine"], "max_length": 2048, "batch_size": 8,
            "micro_batch_size": 1, "learning_rate": 5e-6, "epochs": 3,
            "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "dtype": "bfloat16",
            "valid_fraction": 0.1, "output": "saves/llama3",
        },
        ["# pairs: names in LLaMA-Factory's dataset_info.json",
         "#   template: llama3: not needed, the model's own chat template is used",
         "#   max_samples: 1000: not supported",
         "#   lora_target: all: all linear modules are the default"],
    ),
    "Axolotl": (
        AXOLOTL,
        {
            "model": "mistralai/Mistral-7B-Instruct-v0.3", "bits": 4, "loss_type": ["ipo"],
            "beta": 0.2, "pairs": ["me/orca", "me/other"], "split": "train",
            "valid_fraction": 0.05, "max_length": 4096, "fine_tune_type": "lora", "lora_r": 16,
            "report_to": ["wandb"], "project": "mine", "batch_size": 8, "micro_batch_size": 2,
            "epochs": 2, "optim": "adamw", "lr_scheduler_type": "cosine", "learning_rate": 2e-4,
            "warmup_steps": 10, "output": "./out",
        },
        ["# optim: paged_adamw_8bit there", "# pairs: without type: the schema is detected",
         "#   flash_attention: True: not needed", "#   evals_per_epoch: 4: use `eval_steps` N",
         "#   bf16: auto: mlx-dpo chooses"],
    ),
    "mlx-lm-lora": (
        MLX_LM_LORA,
        {
            "model": "mlx-community/Qwen3-4B-4bit", "pairs": ["my-data"], "fine_tune_type": "dora",
            "max_steps": 100, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-5,
            "loss_type": ["hinge"], "lora_r": 8, "lora_alpha": 160.0, "lora_dropout": 0.05,
            "lora_target_modules": ["q_proj", "up_proj"], "eval_steps": 100, "output": "adapters",
        },
        ["# max_steps: 400 passes there, 4 for each optimizer step", "#   train: True: not needed"],
    ),
    "Unsloth": (
        UNSLOTH,
        {
            "model": "unsloth/Qwen3-4B", "max_length": 2048, "bits": 4, "lora_r": 16,
            "lora_target_modules": ["q_proj", "k_proj"], "recompute": True, "seed": 3407,
            "batch_size": 8, "micro_batch_size": 2, "optim": "adamw", "output": "outputs",
        },
        ["# optim: adamw_8bit there"],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    return CliRunner().invoke(cli, words)


@pytest.mark.parametrize("trainer", EXPECTED)
def test_a_configuration_becomes_settings_that_train_accepts(trainer):
    text, settings, comments = EXPECTED[trainer]
    Path("theirs.yaml").write_text(text)
    result = run("config", "from", "theirs.yaml", "--output", "ours.yaml")
    assert result.exit_code == 0, result.output
    assert f"theirs.yaml: a configuration of {trainer}; " in result.stderr
    written = Path("ours.yaml").read_text()
    assert yaml.safe_load(written) == settings
    DPOConfig.from_dict(read_settings("ours.yaml"))
    lines = written.splitlines()
    for comment in comments:
        assert any(line.startswith(comment) for line in lines), (comment, written)


@pytest.mark.parametrize("trainer", EXPECTED)
def test_nothing_of_a_configuration_disappears(trainer):
    """Each setting that is not false or empty has a setting here, or a reason why it has none."""
    values = {k: v for k, v in yaml.safe_load(EXPECTED[trainer][0]).items() if v is not None}
    for name, value in values.items():
        only = translate({name: value} | dict.fromkeys(MARKS[trainer] - {name}))
        if value is not False and (name, value) != ("stage", "dpo") and name != "dataset_config":
            assert only.settings or only.left_out, name


def test_json_of_training_arguments_is_read_as_well():
    Path("args.json").write_text(
        '{"output_dir": "out", "per_device_train_batch_size": 4, "num_train_epochs": 2, '
        '"adam_beta1": 0.8, "local_rank": -1, "made_up": 1}'
    )
    result = run("config", "from", "args.json")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout) == {
        "output": "out", "batch_size": 4, "micro_batch_size": 4, "epochs": 2, "adam_beta1": 0.8,
    }  # fmt: skip
    assert "#   local_rank: -1: not needed, training runs on one device" in result.stdout
    assert "#   made_up: 1: unknown to mlx-dpo" in result.stdout
    assert "`mlx-dpo train` asks for it: model, pairs" in result.stdout


def test_settings_that_contradict_others_are_left_out_with_the_reason():
    found = translate({"base_model": "m", "rl": "ipo", "rl_beta": 0.1, "simpo_gamma": 0.5})
    assert found.settings == {"model": "m", "loss_type": ["ipo"], "beta": 0.1}
    assert "`simpo_gamma` has no effect" in found.left_out["simpo_gamma: 0.5"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("stage", "rm", "neither preference optimization nor instruction tuning"),
        ("assistant_only_loss", False, "only the assistant's turns are scored"),
        ("finetuning_type", "freeze", "not supported"),
        ("lr_scheduler_type", "polynomial", "polynomial"),
        ("num_train_epochs", "many", "many"),
        ("val_size", 100, "100 rows are held out there"),
        ("pref_loss", "\x1b[31m", "\\x1b[31m"),
    ],
)
def test_values_without_equivalent_are_left_out_with_the_reason(name, value, reason):
    found = translate({"pref_beta": 0.1, name: value})
    assert found.settings == {"beta": 0.1}
    [(shown, why)] = found.left_out.items()
    assert shown.startswith(f"{name}: ")
    assert reason in f"{shown} {why}"
    assert "\x1b" not in found.to_yaml()


def test_what_is_no_configuration_of_another_trainer_is_refused():
    with pytest.raises(ConfigError, match="setting of mlx-dpo already"):
        translate({"learning_rate": 1e-5, "epochs": 2})
    with pytest.raises(ConfigError, match="no setting of Axolotl, LLaMA-Factory, "):
        translate({"title": "x"})
    Path("x.yaml").write_text("title: x\n")
    result = run("config", "from", "x.yaml")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "x.yaml: no setting of " in result.stderr


def test_an_existing_file_is_not_replaced():
    Path("theirs.yaml").write_text(TRL)
    Path("ours.yaml").write_text("mine")
    result = run("config", "from", "theirs.yaml", "--output", "ours.yaml")
    assert result.exit_code == 1
    assert "ours.yaml already exists" in result.stderr
    assert Path("ours.yaml").read_text() == "mine"


def test_train_names_every_unknown_setting_and_how_to_translate_the_file():
    Path("theirs.yaml").write_text(LLAMA_FACTORY)
    result = run("train", "--config", "theirs.yaml")
    assert result.exit_code != 0
    [line] = [text for text in result.stderr.splitlines() if text.startswith("Error: ")]
    for name in ("model_name_or_path", "stage", "cutoff_len", "pref_beta", "ddp_timeout"):
        assert f"`{name}`" in line
    assert line.startswith(
        "Error: theirs.yaml: translate it with `mlx-dpo config from theirs.yaml`; "
    )


def test_every_trainer_has_converters_marks_and_defaults():
    assert CONVERTERS.keys() == MARKS.keys() == OTHER_DEFAULTS.keys() == EXPECTED.keys()


@pytest.mark.parametrize(
    "values",
    [
        {"hub_token": "private"},
        {"wandb_api_key": "private"},
        {"unknown": {"auth_token": "private"}},
        {"unknown": ["hf_abcdefghijprivate"]},
    ],
)
def test_secrets_are_not_shown(values):
    text = translate({"model_name_or_path": "m", **values}).to_yaml()
    assert "private" not in text
    assert "(not shown)" in text


def test_dpo_is_the_default_method():
    for values in ({"base_model": "m", "rl": "dpo"}, {"data": "d", "train_mode": "dpo"}):
        assert translate(values).left_out == {}
    assert translate({"output_dir": "o", "loss_type": "dpo"}).settings["loss_type"] == ["sigmoid"]


def test_a_sum_with_sft_does_not_depend_on_the_order():
    values = {"rpo_alpha": 0.5, "loss_type": "ipo", "output_dir": "o"}
    for given in (values, dict(reversed(values.items()))):
        found = translate(given)
        assert found.settings["loss_type"] == ["ipo", "sft"]
        assert found.settings["loss_weights"] == [1.0, 0.5]
        assert found.left_out == {}


def test_a_sum_with_sft_keeps_every_loss_and_weight():
    values = {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.8, 0.2], "rpo_alpha": 1}
    found = translate({"output_dir": "o", **values}).settings
    assert found["loss_type"] == ["sigmoid", "hinge", "sft"]
    assert found["loss_weights"] == [0.8, 0.2, 1.0]
    kto = translate({"stage": "kto", "pref_ftx": 0.1})
    assert kto.settings["loss_type"] == ["kto"]
    assert list(kto.left_out) == ["pref_ftx: 0.1"]


def test_torch_dtype_is_translated():
    assert translate({"output_dir": "o", "torch_dtype": "float16"}).settings["dtype"] == "float16"


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ({"stage": "sft"}, {"loss_type": ["sft"]}),
        (
            {"stage": "sft", "mask_history": True},
            {"loss_type": ["sft"], "assistant_turns": "last"},
        ),
        ({"assistant_only_loss": True, "output_dir": "o"}, {"loss_type": ["sft"], "output": "o"}),
        ({"completion_only_loss": True, "output_dir": "o"}, {"loss_type": ["sft"], "output": "o"}),
    ],
)
def test_instruction_tuning_of_other_trainers_is_the_loss_sft(values, settings):
    assert translate(values).settings == settings
